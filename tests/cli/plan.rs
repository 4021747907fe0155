//! `trencadis plan`.

use super::*;

#[test]
fn vit_22b_on_64_gpus() {
    let place = Place::new();
    let begun = std::time::Instant::now();
    let done = place.run("plan vit-22b --gpus 64 --memory 80GiB").succeeds();
    assert!(begun.elapsed().as_secs() < 60, "a plan is quick, even unoptimised");
    done.says(&[
        "recipe            vit-22b, 22.2 G parameters, 1000 classes\n",
        "step              1024 batches of 16384 tokens",
        "GPUs              64 of 80.0 GiB",
        "stated, not measured",
        "left out: model.heads 48 cannot be shared evenly by 32 ranks",
        "\nchosen            ",
        "\nmemory            ",
        "\n  model.recompute   activations       memory  FLOPs again  moved again       step  on 32 x 2\n",
        "\n> none  ",
        "\n  selective  ",
        "\n  full  ",
        "\n  activations at the peak       kept  in passing    made again\n",
        "\n  residual stream  ",
        "\n  GELU  ",
        "\nsent a step       tensor axis ",
        "\nstep time         ",
        "\nMFU               ",
        "\nrun               srun --ntasks 64 --ntasks-per-node 8 trencadis train vit-22b --data PATH",
    ]);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 0);
}

#[test]
fn a_plan_says_how_to_run_it() {
    let place = Place::new();
    place.run("plan vit-b16 --gpus 4 --memory 141GB --set train.accumulate=2 --peak 312TFLOP/s").succeeds().says(&[
        "(train.accumulate raised from 2",
        "187 TFLOP/s a GPU over a step (60 % of its peak)",
        "trencadis train vit-b16 --data PATH --ranks 4 --set train.accumulate=2 --set train.accumulate=4\n",
    ]);
    let alone = place.run("plan vit-b16 --gpus 1 --flops 600TFLOP/s").succeeds();
    alone.says(&[
        "run               trencadis train vit-b16 --data PATH\n",
        "600 TFLOP/s",
        "3.35 TB/s of its memory",
        "\n> none  ",
        "\n  selective  ",
        "\n  full  ",
        "\n  attn.qkv  ",
        "\n  pre-activations  ",
        "\n  GELU  ",
        "\n  norms  ",
    ]);
    let tight = place.run("plan vit-b16 --gpus 1 --memory 8GiB --bandwidth 2TB/s").succeeds();
    tight.says(&[
        "2.00 TB/s of its memory",
        "\n> selective  ",
        "model.recompute = \"selective\"",
        "run               trencadis train vit-b16 --data PATH --set model.recompute=selective\n",
    ]);
}

#[test]
fn plans_that_cannot_be_made() {
    let place = Place::new();
    for (words, parts) in [
        ("plan vit-22b --gpus 0", &["--gpus must be at least 1"][..]),
        ("plan vit-22b", &["--gpus"]),
        ("plan --gpus 4", &["RECIPE"]),
        ("plan vit-22b --gpus 64 --memory 80", &["80", "--memory", "a number with its unit, such as 80GiB"]),
        ("plan vit-22b --gpus 64 --flops 3GB", &["--flops", "such as 600TFLOP/s"]),
        ("plan vit-b16 --gpus 2 --flops 2PFLOP/s", &["--flops is above --peak"]),
        ("plan vit-b16 --gpus 2 --gpus-per-node 0", &["--gpus-per-node must be at least 1"]),
        ("plan vit-b16 --gpus 2 --classes 0", &["--classes must be at least 1"]),
        ("plan vit-33b --gpus 64", &["there is no recipe `vit-33b`", "did you mean `vit-22b`"]),
        (
            "plan vit-22b --gpus 2 --memory 40GiB",
            &["no mesh of 2 GPUs fits 40.0 GiB a GPU", "the least is", "take "],
        ),
        ("plan vit-b16 --gpus 2 --set model.heads=2", &["no kernel on a GPU"]),
    ] {
        place.run(words).refuses(parts);
    }
}
