#!/usr/bin/env bash
# Everything that docs/performance.md holds, stage by stage, on one GPU. Results are appended to RESULTS/*.jsonl as they come,
# so a run that is cut off goes on where it stopped (our own stages; --resume needs the same commit).
#
# usage: bench/gpu.sh STAGE...   stages: small small-peer small-peer-draft body body-plain body-peer profile report
#
# RESULTS        folder of the result files                              (default results)
# MODEL DRAFTER  the small model and its drafter                          (default the embedded ones)
# BODY BODY_DRAFTER  from: dspark bench inflate --out BODY --drafter-out BODY_DRAFTER
# PROMPTS SETS   folder and names of prompt sets                          (default the project's own)
# REPEATS TOKENS of every point, and new tokens of a request             (default 3 and 256)
# KV_TOKENS      of every engine of ours                                  (default 130000)
# LEVELS REQUESTS  streams, and requests at each, of all stages           (default: by the stage)
set -euo pipefail
results=${RESULTS:-results} repeats=${REPEATS:-3} body=${BODY:-} body_drafter=${BODY_DRAFTER:-}
model=${MODEL:-$(python3 -m dspark.deploy.default_model)}
drafter=${DRAFTER:-deploy/default_drafter} kv=${KV_TOKENS:-130000}
prompts=(--max-tokens "${TOKENS:-256}" --repeats "$repeats" ${PROMPTS:+--prompts "$PROMPTS"} --sets "${SETS:-code,math,chat}")
small=(--concurrency "${LEVELS:-1,16,64,256}" --requests "${REQUESTS:-48,192,640,1536}")
large=(--concurrency "${LEVELS:-1,4,16,64,128,256}" --requests "${REQUESTS:-4,16,64,256,512,768}")
few=(--concurrency "${LEVELS:-1,64,256}" --requests "${REQUESTS:-4,256,768}")
mkdir -p "$results"
bench() { python3 -m dspark bench "$@"; }
need_body() { [[ -n $body && -n $body_drafter ]] || { echo "BODY and BODY_DRAFTER name what dspark bench inflate wrote" >&2; exit 2; }; }

for stage in "$@"; do
  echo "== $stage"
  case $stage in
    small)
      bench offline --model "$model" --drafter "$drafter" "${prompts[@]}" "${small[@]}" --modes plain,static:1,static:7,adaptive \
        --max-model-len 2048 --kv-tokens "$kv" --json "$results/small.jsonl" --resume ;;
    small-peer) bench vllm --model "$model" "${prompts[@]}" "${small[@]}" --json "$results/small-peer.jsonl" ;;
    small-peer-draft)
      bench vllm --model "$model" --drafter "$drafter" --draft-len 7 "${prompts[@]}" "${small[@]}" --json "$results/small-peer.jsonl" ;;
    body)  # without plain decoding: two engines of this size leave no room for the KV of 256 streams on 80 GB
      need_body
      bench offline --model "$body" --drafter "$body_drafter" "${prompts[@]}" "${large[@]}" --modes static:1,adaptive:5 \
        --max-model-len 2048 --kv-tokens "$kv" --json "$results/body.jsonl" --resume ;;
    body-plain)
      need_body
      bench offline --model "$body" --drafter none "${prompts[@]}" "${large[@]}" --modes plain \
        --max-model-len 2048 --kv-tokens "$kv" --json "$results/body.jsonl" --resume ;;
    body-peer)
      need_body
      bench vllm --model "$body" "${prompts[@]}" "${few[@]}" --json "$results/body-peer.jsonl" ;;
    profile)
      need_body
      for case in "plain 1" "adaptive:5 1" "adaptive:5 64"; do
        read -r mode streams <<< "$case"
        bench profile --model "$body" --drafter "$body_drafter" --mode "$mode" --concurrency "$streams" --max-model-len 2048 \
          --kv-tokens "$kv" --json "$results/profile.jsonl"
        bench profile --model "$model" --drafter "$drafter" --mode "${mode%:5}" --concurrency "$streams" --max-model-len 2048 \
          --kv-tokens "$kv" --json "$results/profile.jsonl"
      done ;;
    report)
      met=0
      bench report "$results"/small*.jsonl --bar 'plain / vllm-0.26.0 plain @ 1 >= 3' --bar 'plain / vllm-0.26.0 plain @ 64,256 >= 1.5' \
        --bar 'adaptive:7 / plain @ 1,16 >= 1.5' --bar 'adaptive:7 / plain @ 256 >= 1' || met=1
      [[ -e $results/body.jsonl ]] && { bench report "$results"/body*.jsonl --bar 'plain / vllm-0.26.0 plain @ 1,64,256 >= 1' || met=1; }
      exit $met ;;
    *) echo "stage $stage is not known" >&2; exit 2 ;;
  esac
done
