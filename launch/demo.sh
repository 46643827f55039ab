#!/usr/bin/env bash
# The whole path on two CPU cores in minutes: recordings -> shards -> training -> evaluation -> new audio, in two processes.
# The recordings are the speech that ships as shards/demo. Everything new is in runs/demo and shards/demo-packed.
# SKIP_SETUP=1 uses the active environment instead of making .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
launch="accelerate launch --config_file launch/accelerate/cpu.yaml"
recordings=$(mktemp -d)
trap 'rm -rf "$recordings"' EXIT

for split in train valid test; do
    mkdir "$recordings/$split"
    tar xf "shards/demo/$split-000000.tar" -C "$recordings/$split"
done
python tools/make_shards.py "$recordings" --split folders --sample-rate 8000 --out shards/demo-packed
python tools/check_shards.py shards/demo-packed
$launch launch/train.py --config launch/recipes/demo.yaml --data.shards shards/demo-packed
$launch launch/evaluate.py runs/demo --split test
$launch launch/sample.py runs/demo --clips 4 --seconds 2 --batch-size 2 --seed 0

echo
echo "audio        $(pwd)/runs/demo/samples/*.wav"
echo "checkpoints  $(pwd)/runs/demo/checkpoints"
echo "logs         tensorboard --logdir $(pwd)/runs"
