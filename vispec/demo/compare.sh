#!/bin/sh
# A head of every method for the embedded target, and the tables that compare them: the same samples and as many
# optimizer steps for all, every tree tuned on scenes that are not reported. Run it from the repository's root after
# rebuild.sh, whose data it takes; every step goes on where it was interrupted. About three hours on two CPU cores.
# Stage 1 is six epochs of text, stage 2 eight of images. MSD mixes both by its own schedule; an epoch of it is as long
# as the texts are many, so 23 are as many steps. Heads that learn from their own outputs do so for three more steps.
set -eu
PYTHON=${PYTHON:-python}
WORK=${WORK:-out/rebuild}
OUT=${OUT:-out/compare}
TARGET=$WORK/target/model

# train NAME COMMAND …: the head OUT/NAME
train() {
    name=$1
    command=$2
    shift 2
    $PYTHON -m accelerate.commands.launch --num_processes 1 --cpu -m "vispec.train.$command" --basepath "$TARGET" \
        --configpath vispec/demo/draft_config.json --cpdir "$OUT/$name" --lr 1e-3 --bs 16 "$@"
}
text="--tmpdir $WORK/text --num-epochs 6 --save-every 6"
images="--tmpdir $WORK/images --num-epochs 8 --save-every 8"
stage1="--loadpath $WORK/stage1/state_6"
own_outputs="--mtp-steps=3 --loss ce"

train medusa_text main_medusa $text --pw 10
train medusa main_medusa $images --loadpath "$OUT/medusa_text/state_6" --pw 10
train eagle2 main_mtp $images $stage1 --use-ours=False $own_outputs
train eagle3_text main_eagle3 $text --ttt-length 4
train eagle3 main_eagle3 $images --loadpath "$OUT/eagle3_text/state_6" --ttt-length 4
train msd main_msd --tmpdir "$WORK/text" "$WORK/images" --num-epochs 23 --save-every 23
train specvlm main_mtp $images $stage1 --method specvlm --compressor select
train blind main_mtp $images $stage1 --use-ours=True --num-q=2 $own_outputs --blind=True
train vispec main_mtp $images $stage1 --use-ours=True --num-q=2 $own_outputs

[ -d "$OUT/benchmarks" ] || {
    $PYTHON -m vispec.demo.make_benchmarks --out "$OUT/benchmarks.new" --count 200
    mv "$OUT/benchmarks.new" "$OUT/benchmarks"
}
$PYTHON -m vispec.evaluation.run_all --base-model-path "$TARGET" --data-root "$OUT/benchmarks" --out "$OUT/answers" \
    --methods generate lookup vlm medusa eagle2 eagle3 msd specvlm vispec --spec-model-path vlm="$WORK/small/model" \
    medusa="$OUT/medusa/state_8" eagle2="$OUT/eagle2/state_8" eagle3="$OUT/eagle3/state_8" msd="$OUT/msd/state_23" \
    specvlm="$OUT/specvlm/state_8" vispec-blind="$OUT/blind/state_8" vispec="$OUT/vispec/state_8" \
    --benchmarks sqa mmvet textvqa mme coco_caption vizwiz gqa seed_bench mmspec --question-end 25 --max-new-token 256 \
    --dtype float32 --tree tune --tune-on coco_caption
$PYTHON -m vispec.evaluation.speed --results "$OUT/answers" --figure "$OUT/speedup.png"
$PYTHON -m vispec.demo.trees --first-question 0 --draft "$OUT/vispec/state_8" --trees 16/7/2 talon:n=16,d=7,k=2 \
    threshold:n=16,d=7,k=2 sage:n=16,d=7,k=2 ddd:n=16,d=10,k=2 60/8/10 talon threshold:n=60,d=8,k=10 sage ddd
