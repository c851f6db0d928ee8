#!/usr/bin/env bash
# Trains the model that ships, all the way: scenes, training examples, training, weights to draw with, and how good they are.
#
#   examples/train_nano.sh var/nano                          on two CPU cores: a few hours, for a first model
#   STEPS=8450 BATCH=1024 SCENES=400000 CROPS=0.4 DEVICE=cuda examples/train_nano.sh var/nano
#                                                            on an H200: a quarter of an hour
#   INIT=var/nano/checkpoint SEED=17 examples/train_nano.sh var/next
#                                                            another stage, on other scenes
#
# Stopped at whatever moment, the same command goes on where it was. What may be set, besides: PRESET, CROP_FRACTION (share
# of steps on crops of finer levels), LEVEL_WEIGHTS (how often each level is cut; 3,2,1,1,1 prefers the coarse ones), EMA,
# PROMPTS (how many the result is asked for; 0 for none). docs/training-log.md has what the shipped weights were trained with.
set -euo pipefail

folder=${1:?"where to? examples/train_nano.sh FOLDER"}
seed=${SEED:-0}
device=${DEVICE:-auto}
mkdir -p "$folder"

physformer data fetch scenes --count "${SCENES:-120000}" --seed "$seed" --held-out-pairs 0.1 --output "$folder/scenes"

physformer data preprocess "$folder/scenes" --output "$folder/set" --crops-per-example "${CROPS:-1.2}" --device "$device" \
    --preset "${PRESET:-nano}" ${LEVEL_WEIGHTS:+--level-weights "$LEVEL_WEIGHTS"}

physformer train --preset "${PRESET:-nano}" --data-dir "$folder/set" --output "$folder/run" --resume auto \
    --seed "$seed" --device "$device" \
    ${STEPS:+--steps "$STEPS"} ${BATCH:+--batch-size "$BATCH"} ${CROP_FRACTION:+--crop-fraction "$CROP_FRACTION"} \
    ${EMA:+--ema-decay "$EMA"} ${INIT:+--init-from "$INIT"}

rm -rf "$folder/checkpoint" # of fewer steps, perhaps
physformer export "$folder/run" --output "$folder/checkpoint"

if [ "${PROMPTS:-100}" -gt 0 ]; then
    physformer eval prompts --checkpoint "$folder/checkpoint" --num "${PROMPTS:-100}" --relations $((${PROMPTS:-100} / 2)) \
        --phrased $((${PROMPTS:-100} / 4)) --device "$device" --contact-sheet "$folder/sheet.png"
fi
