"""Pure routing policy over replica views. No torch, no Ray, no clocks."""
