#!/bin/sh
# Makes the embedded default from nothing: the tiny VLM, its training data, its draft head by the same command lines
# that the large models use, and a smaller VLM that drafts too. Run it from the repository's root; every step goes on
# where it was interrupted. About four hours on two CPU cores. The weights are put in place only at the end.
set -eu
PYTHON=${PYTHON:-python}
WORK=${WORK:-out/rebuild}
WEIGHTS=vispec/demo/weights
TARGET=$WORK/target/model

$PYTHON -m vispec.demo.build_target --out "$WORK/target" --minutes "${MINUTES:-115}"
code=0
$PYTHON -m vispec.demo.check_target --model "$TARGET" || code=$?
case $code in
    0) ;;
    3) echo "the target misses a threshold; going on with it" ;;
    *) exit "$code" ;;
esac

if [ ! -d "$WORK/data" ]; then
    rm -rf "$WORK/data.new"
    $PYTHON -m vispec.demo.make_data --out "$WORK/data.new" --text 600 --images 1300 --eval 100
    mv "$WORK/data.new" "$WORK/data"
fi
$PYTHON -m vispec.ge_data.allocation_llava_shargpt --model "$TARGET" --dtype float32 \
    --store eagle3 --data-folder "$WORK/data/ShareGPT_V3" --outdir "$WORK/text" --start 0 --end 599
# eagle3 stores what any head reads: demo.ablation and compare.sh train others too
$PYTHON -m vispec.ge_data.allocation_llava_pretrain_gen --model "$TARGET" --dtype float32 --batch-size 32 \
    --max-new-tokens 300 --store eagle3 --data-folder "$WORK/data/LLaVA-Pretrain" --outdir "$WORK/images" \
    --start 0 --end 1299

$PYTHON -m accelerate.commands.launch --num_processes 1 --cpu -m vispec.train.main \
    --basepath "$TARGET" --configpath vispec/demo/draft_config.json --tmpdir "$WORK/text" --cpdir "$WORK/stage1" \
    --lr 1e-3 --bs 16 --num-epochs 6
$PYTHON -m accelerate.commands.launch --num_processes 1 --cpu -m vispec.train.main_mtp \
    --basepath "$TARGET" --configpath vispec/demo/draft_config.json --loadpath "$WORK/stage1/state_6" \
    --tmpdir "$WORK/images" --cpdir "$WORK/stage2" --lr 1e-3 --bs 16 --num-epochs 8 \
    --use-ours=True --num-q=2 --mtp-steps=3 --loss ce --save-dtype bfloat16

$PYTHON -m vispec.demo.build_target --out "$WORK/small" --size small --processor "$TARGET" \
    --minutes "${SMALL_MINUTES:-37}"

rm -rf "$WEIGHTS.new" && mkdir -p "$WEIGHTS.new/draft"
cp -r "$TARGET" "$WEIGHTS.new/target"
cp -r "$WORK/small/model" "$WEIGHTS.new/small"
cp "$WORK/stage2/state_8/config.json" "$WORK/stage2/state_8/model.safetensors" "$WEIGHTS.new/draft"
$PYTHON -m vispec.demo.ship_questions --out "$WEIGHTS.new/questions"
rm -rf "$WEIGHTS" && mv "$WEIGHTS.new" "$WEIGHTS"
