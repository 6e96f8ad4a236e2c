"""Where drafts come from: the drafters behind the seam ``dspark.types.Drafter``."""
