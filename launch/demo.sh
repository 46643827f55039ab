#!/usr/bin/env bash
# The whole path on two CPU cores in minutes: check the shipped corpus, train with two processes, evaluate, generate.
# Everything ends up in runs/demo. SKIP_SETUP=1 uses the active environment instead of making .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
export OMP_NUM_THREADS=1
launch="accelerate launch --config_file launch/accelerate/cpu.yaml"

python tools/check_shards.py shards/demo
$launch launch/train.py --config launch/recipes/demo.yaml
$launch launch/evaluate.py runs/demo --split test
$launch launch/sample.py runs/demo --clips 4 --seconds 2 --batch-size 2 --seed 0

echo
echo "audio        runs/demo/samples/*.wav"
echo "checkpoints  runs/demo/checkpoints"
echo "logs         tensorboard --logdir runs"
