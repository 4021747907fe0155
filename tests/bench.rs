//! The room of the GPU benchmarks: shapes are read, and every family measures and writes its lines. Times
//! that a test sees mean nothing.

#[path = "../benches/common/mod.rs"]
mod common;
mod support;

use common::gpu::{Case, Gpu, clocks, table};
use common::shapes::{Images, Shape, parse};
use common::step;
use criterion::Criterion;
use support::devices::devices;
use trencadis::data::batch::{PackedBatch, Patches};
use trencadis::data::packing;
use trencadis::device::Stream;
use trencadis::kernels::gemm::Layout;
use trencadis::kernels::measure::{CopyParams, launch_copy};
use trencadis::recipe::Recipe;

#[test]
fn own_shapes_are_read() {
    let text = "gemm 128 192 64; # first\n attention 2 72 64*196,577\npool 3 64 7\nembedding 64 7\n\nrows 100 72\n\
                loss 256 1000; contrastive 256 512; optim 768 12; step navit-b16 4096; view 375 500 224 8";
    let lengths = [vec![196; 64], vec![577]].concat();
    let images = |name: &str, lengths: Vec<usize>| Images { name: name.into(), lengths };
    let expected = vec![
        Shape::Gemm { m: 128, n: 192, k: 64 },
        Shape::Attention { heads: 2, head_dim: 72, images: images("64*196,577", lengths) },
        Shape::Pool { heads: 3, head_dim: 64, images: images("7", vec![7]) },
        Shape::Embedding { width: 64, images: images("7", vec![7]) },
        Shape::Rows { rows: 100, width: 72 },
        Shape::Loss { images: 256, classes: 1000 },
        Shape::Contrastive { pairs: 256, width: 512 },
        Shape::Optim { width: 768, depth: 12 },
        Shape::Step { recipe: "navit-b16".into(), tokens: 4096 },
        Shape::View { size: (375, 500), target: 224, images: 8 },
    ];
    assert_eq!(parse(text), Ok(expected));
    for line in [
        "gemm 128 192",
        "gemm 0 8 8",
        "attention 2 64 x",
        "pool 2 64 0",
        "pool 2 64 9999999999*99",
        "rows 8 12",
        "loss 4",
        "contrastive 4 12",
        "optim 0 12",
        "step 4096",
        "view 375 500 220 8",
        "view 375 500 224",
        "step navit-b16 0",
        "conv 1 2 3",
        "gemm 8 8 8 8",
    ] {
        let message = parse(line).unwrap_err();
        assert!(message.contains(&format!("\"{line}\" is no shape")), "{message}");
    }
}

#[test]
fn mixes_fill_the_batch() {
    let images = Images::mix(64.0, 512.0, 32_768);
    assert!(images.tokens() <= 32_768 && images.tokens() > 31_000);
    assert_eq!(images.cu_seqlens().len(), images.lengths.len() + 1);
    assert!(images.lengths.iter().all(|&length| (9..=1100).contains(&length)));
}

#[test]
fn readings_of_the_clocks() {
    let reading = clocks::parse("580.65.06, 1980, 2619, 512.33, [N/A]").unwrap();
    assert_eq!((reading.driver.as_str(), reading.sm_mhz), ("580.65.06", Some(1980.0)));
    assert_eq!((reading.watts, reading.celsius), (Some(512.33), None));
    assert!(clocks::parse("no devices were found").is_none());
}

#[test]
fn every_family_gives_lines_of_the_table() {
    for device in devices().into_iter().take(1) {
        let gpu = Gpu::on(device).unwrap();
        assert!(gpu.peaks.operations > 0.0 && gpu.peaks.bytes > 0.0);
        let mut lines = Vec::new();
        let mut sink = |case: &Case<'_>| gpu.once(case).map(|line| lines.push(line));
        let images = Images { name: "9+30".into(), lengths: vec![9, 30] };
        common::pool::shape_cases(&gpu, 2, 64, &images, &mut sink).unwrap();
        common::attention::shape_cases(&gpu, 2, 64, &images, &mut sink).unwrap();
        common::norm::shape_cases(&gpu, 40, 72, &mut sink).unwrap();
        common::residual::shape_cases(&gpu, 40, 72, &mut sink).unwrap();
        common::residual::keep_case(&gpu, &images, 3, &mut sink).unwrap();
        common::loss::shape_cases(&gpu, 3, 10, &mut sink).unwrap();
        common::contrastive::shape_cases(&gpu, 5, 24, &mut sink).unwrap();
        common::optim::shape_cases(&gpu, 8, 2, &mut sink).unwrap();
        common::patch::normalise_cases(&gpu, 14, &images, &mut sink).unwrap();
        common::patch::prefix_cases(&gpu, 64, &images, &mut sink).unwrap();
        common::view::shape_cases(&gpu, 2, (30, 20), 32, &mut sink).unwrap();
        common::position::shape_cases(&gpu, 64, &images, &mut sink).unwrap();
        common::position::rope_case(&gpu, 64, &images, &mut sink).unwrap();
        common::elementwise::shape_cases(&gpu, 64, &images, &mut sink).unwrap();
        common::collective::shape_cases(&gpu, 2, 39, &mut sink).unwrap();
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            for &fused in common::gemm::all_fused(layout) {
                let shape = trencadis::kernels::gemm::Shape { layout, m: 40, n: 24, k: 16 };
                common::gemm::shape_case(&gpu, shape, fused, &mut sink).unwrap();
            }
        }
        common::gemm::bias_case(&gpu, 40, 24, &mut sink).unwrap();
        let columns = table::HEADER.split(',').count();
        let mut kernels = Vec::new();
        for line in &lines {
            let cells: Vec<&str> = line.split(',').collect();
            assert_eq!(cells.len(), columns, "{line}");
            let family = cells[0].split('_').next().unwrap();
            let shape = match (family, cells[0]) {
                (_, "drop_path_keep") => "3x9+30",
                (_, "patch_prefix_write" | "patch_prefix_grad") => "5x64_9+30",
                (_, "bias_grad") => "40x24",
                ("gemm", _) => "40x24x16",
                ("loss", _) => "3x10",
                ("contrastive", _) => "5x24",
                ("optim", _) => "8x2",
                ("norm" | "residual", _) => "40x72",
                ("patch", _) => "3x14x14_9+30",
                ("view", _) => "2x30x20_32",
                ("position", _) => "64_9+30",
                ("elementwise", _) => "39x64",
                ("collective", _) => "2x24",
                _ => "2x64_9+30",
            };
            assert_eq!(cells[1], shape, "{line}");
            assert!(cells[2].parse::<f64>().unwrap() > 0.0, "{line}");
            // Either operations or bytes are what counts.
            let (operations, bytes) = (cells[3].parse::<f64>(), cells[5].parse::<f64>());
            let computes = ["gemm", "attention", "contrastive"].contains(&family);
            assert_eq!((operations.is_ok(), bytes.is_ok()), (computes, !computes), "{line}");
            kernels.push(cells[0]);
        }
        // Products that Hopper's own kernel computes are measured by the portable one as well.
        kernels.retain(|kernel| !kernel.ends_with("_portable"));
        let expected = [
            "pool_attention_forward",
            "pool_attention_backward",
            "pool_mean_forward",
            "pool_mean_backward",
            "pool_gather_forward",
            "pool_gather_backward",
            "attention_forward_rms",
            "attention_backward_rms",
            "attention_forward_plain",
            "attention_backward_plain",
            "schedule",
            "norm_forward",
            "norm_forward_residual",
            "norm_backward",
            "norm_backward_residual",
            "residual_forward",
            "residual_backward",
            "drop_path_keep",
            "loss_softmax_classes",
            "loss_softmax_soft",
            "loss_sigmoid_classes",
            "loss_sigmoid_soft",
            "contrastive_softmax",
            "contrastive_sigmoid",
            "optim_norm",
            "optim_adamw",
            "optim_adamw_average",
            "optim_lamb",
            "optim_sgd",
            "optim_adafactor",
            "optim_zero",
            "optim_cast",
            "patch_normalise_u8",
            "patch_normalise_f32",
            "patch_prefix_write",
            "patch_prefix_grad",
            "view_resize",
            "view_patches",
            "position_sum_forward",
            "position_sum_backward",
            "position_sum_fractional_forward",
            "position_sum_fractional_backward",
            "position_joint_fractional_forward",
            "position_joint_fractional_backward",
            "position_fourier_forward",
            "position_fourier_backward",
            "position_rope_table",
            "elementwise_add",
            "elementwise_add_row",
            "elementwise_gelu",
            "elementwise_accumulate",
            "collective_sum_f32",
            "collective_sum_bf16",
            "gemm_nt_plain",
            "gemm_nt_bias",
            "gemm_nt_gelu_erf",
            "gemm_nt_gelu_tanh",
            "gemm_nt_residual",
            "gemm_nn_plain",
            "gemm_nn_gelu_erf_grad",
            "gemm_nn_gelu_tanh_grad",
            "gemm_tn_sum",
            "bias_grad",
        ];
        assert_eq!(kernels, expected);
    }
}

/// Rows that move beside a product, in every way that they are measured in.
#[test]
fn products_in_chunks_are_measured() {
    use common::gemm::sharded::{HEADER, Moves, Moving, WAYS};
    for device in devices().into_iter().take(1) {
        let gpu = Gpu::on(device).unwrap();
        for (layout, moves) in [(Layout::Nt, Moves::In), (Layout::Nn, Moves::Out)] {
            let shape = trencadis::kernels::gemm::Shape { layout, m: 160, n: 72, k: 64 };
            let moving = Moving::new(&gpu, shape, moves, 4).unwrap();
            let seconds = WAYS.map(|way| gpu.seconds(&|| moving.queue(way)).unwrap());
            let line = moving.line(seconds);
            assert_eq!(line.split(',').count(), HEADER.split(',').count(), "{line}");
            assert!(line.contains("160x72x64,4,"), "{line}");
        }
    }
}

/// Every tile is checked and timed; each product has one that was chosen.
#[cfg(feature = "emulator")]
#[test]
fn tiles_are_tuned() {
    use common::gemm::{Fused, tune};
    use trencadis::kernels::gemm::{HOPPER_TILES, Kind, Shape};

    let device = devices().into_iter().find(|device| device.info().hopper).unwrap();
    let gpu = Gpu::on(device).unwrap();
    let shape = |layout, k| Shape { layout, m: 136, n: 264, k };
    let products = vec![
        (shape(Layout::Nt, 72), Fused::Residual),
        (shape(Layout::Nn, 72), Fused::GeluGrad(trencadis::recipe::GeluKind::Erf)),
        (shape(Layout::Tn, 1024), Fused::Sum),
    ];
    let tuning = tune::Tuning { checked: products.clone(), runs: 2, timed: products, samples: 1 };
    let mut csv = Vec::new();
    let page = tune::run(&gpu, &tuning, &mut csv).unwrap();
    let csv = String::from_utf8(csv).unwrap();
    let columns: Vec<&str> = tune::HEADER.split(',').collect();
    let column = |name: &str| columns.iter().position(|column| *column == name).unwrap();
    for (kernel, kind) in [
        ("gemm_nt_residual", Kind::Store),
        ("gemm_nn_gelu_erf_grad", Kind::GeluGrad),
        ("gemm_tn_sum", Kind::Sum),
    ] {
        let rows: Vec<Vec<&str>> = csv
            .lines()
            .map(|line| line.split(',').collect())
            .filter(|row: &Vec<&str>| row[0] == kernel)
            .collect();
        assert!(rows.iter().all(|row| row.len() == columns.len() && row[1].starts_with("136x264x")), "{csv}");
        assert_eq!(rows.iter().filter(|row| row[column("chosen")] == "1").count(), 1, "{csv}");
        for tile in HOPPER_TILES.into_iter().filter(|tile| tile.has(kind)) {
            let name = format!("{}x{} ", tile.m, tile.n);
            assert!(rows.iter().any(|row| row[2].starts_with(&name)), "{kernel} {name}: {csv}");
        }
        assert!(rows.iter().any(|row| row[2].ends_with("portable")), "{csv}");
        assert!(page.contains(&format!("| {kernel} | 136x264x")), "{page}");
    }
}

/// A device without such tiles is told what would have them.
#[cfg(feature = "emulator")]
#[test]
fn tuning_wants_hopper() {
    use common::{attention, gemm};
    let device = devices().into_iter().find(|device| !device.info().hopper).unwrap();
    let gpu = Gpu::on(device).unwrap();
    let tiles = gemm::tune::Tuning { checked: Vec::new(), runs: 1, timed: Vec::new(), samples: 1 };
    for error in [
        gemm::tune::run(&gpu, &tiles, &mut Vec::new()).unwrap_err(),
        attention::tune::run(&gpu, &attention::tune::Tuning::of_vits(), &mut Vec::new()).unwrap_err(),
    ] {
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("take an H100 or H200"), "{error}");
    }
}

/// Every plan of both passes is checked and timed; each batch has one that was chosen.
#[cfg(feature = "emulator")]
#[test]
fn plans_of_attention_are_tuned() {
    use common::attention::operands::Pass;
    use common::attention::tune;

    let device = devices().into_iter().find(|device| device.info().hopper).unwrap();
    let gpu = Gpu::on(device).unwrap();
    let images = |name: &str, lengths: &[usize]| Images { name: name.into(), lengths: lengths.into() };
    let tuning = tune::Tuning {
        checked: vec![
            (2, 64, images("ragged", &[5, 0, 70, 1, 200, 2, 40, 64])),
            (1, 80, images("ragged", &[0, 33, 120])),
        ],
        padding: 3,
        runs: 2,
        timed: vec![(2, 64, images("2*9", &[9, 9])), (1, 80, images("17,40", &[17, 40]))],
        samples: 1,
        limit: std::time::Duration::MAX,
    };
    let mut csv = Vec::new();
    let page = tune::run(&gpu, &tuning, &mut csv).unwrap();
    let csv = String::from_utf8(csv).unwrap();
    assert_eq!(csv.lines().next(), Some(tune::HEADER));
    let columns: Vec<&str> = tune::HEADER.split(',').collect();
    let column = |name: &str| columns.iter().position(|column| *column == name).unwrap();
    for (shape, head_dim, row) in [("2x64_2*9", 64, "2x64_2*9,"), ("1x80_17,40", 80, "\"1x80_17,40\",")] {
        for pass in Pass::ALL {
            let begin = format!("{},{row}", pass.name());
            let rows: Vec<Vec<&str>> = csv
                .lines()
                .filter_map(|line| line.strip_prefix(&begin))
                .map(|rest| [pass.name(), shape].into_iter().chain(rest.split(',')).collect())
                .collect();
            assert!(rows.len() >= pass.plans(head_dim, gpu.device.info()).unwrap().len(), "{csv}");
            assert!(rows.iter().all(|row| row.len() == columns.len()), "{csv}");
            let number = |row: &Vec<&str>, name: &str| row[column(name)].parse::<f64>().unwrap();
            assert!(rows.iter().all(|row| number(row, "microseconds") > 0.0), "{csv}");
            assert_eq!(rows.iter().map(|row| number(row, "chosen")).collect::<Vec<_>>()[0], 1.0, "{csv}");
            assert_eq!(rows.iter().map(|row| number(row, "chosen")).sum::<f64>(), 1.0, "{csv}");
            assert!(rows.iter().any(|row| number(row, "portable") == 1.0), "{csv}");
            assert_eq!(page.matches(&format!("| {} | {shape} |", pass.name())).count(), 1, "{page}");
        }
    }
    assert!(page.contains("on 2 ragged batches") && page.contains("the same bits 2 times"), "{page}");
    assert!(!page.contains("Time was out"), "{page}");

    let tuning = tune::Tuning { checked: Vec::new(), limit: std::time::Duration::ZERO, ..tuning };
    let page = tune::run(&gpu, &tuning, &mut Vec::new()).unwrap();
    assert!(page.contains("Time was out after 0 of 4 rows."), "{page}");
}

/// What is far from the portable result is told with its place, and other bits of the same number are other results.
#[test]
fn wrong_results_of_attention_are_found() {
    use common::attention::operands::{Group, Results};
    use common::attention::tune::far;
    use half::bf16;

    let group = |values: &[f32]| Group { name: "dq".into(), values: values.into() };
    let want = group(&[1.0, -2.0, 0.0, 3.0]);
    assert_eq!(far(&group(&[1.005, -2.01, 0.02, 2.98]), &want), None);
    let message = far(&group(&[1.05, -1.95, 0.05, 3.05]), &want).unwrap();
    assert!(message.starts_with("dq is 5.0e-2 from what is wanted"), "{message}");
    let lse = |value: f32| Group { name: "lse of image 0 of 9 rows".into(), values: vec![value] };
    assert_eq!(far(&lse(5.001), &lse(5.0)), None);
    assert!(far(&lse(5.01), &lse(5.0)).is_some());
    assert_eq!(far(&group(&[1e-7, 0.0]), &group(&[0.0, -1e-8])), None);
    for (place, value) in [(0, 2.0), (1, f32::NAN), (2, 0.2), (3, f32::INFINITY)] {
        let mut values = want.values.clone();
        values[place] = value;
        let message = far(&group(&values), &want).unwrap();
        assert!(message.starts_with(&format!("element {place} of dq is ")), "{message}");
    }
    let results = |row: f32, float: f32| Results {
        rows: vec![bf16::from_f32(row)],
        floats: vec![vec![0.5], vec![float]],
    };
    assert!(results(f32::NAN, f32::NAN).same_bits(&results(f32::NAN, f32::NAN)));
    assert!(!results(0.0, 1.0).same_bits(&results(-0.0, 1.0)));
    assert!(!results(0.0, 0.0).same_bits(&results(0.0, -0.0)));
}

/// Batches of the recipes are as full as those of a training.
#[test]
fn batches_of_every_recipe() {
    for name in step::RECIPES {
        let recipe = Recipe::load(name, &[]).unwrap();
        let batch = &trencadis::train::profile::batches::batches(&recipe, step::classes(name), 1).unwrap()[0];
        let (live, budget) = (batch.live_tokens(), recipe.packing.tokens);
        assert_eq!((batch.tokens(), batch.slots()), (budget, packing::slots(&recipe)), "{name}");
        assert!(live as f64 > 0.97 * budget as f64, "{name}: {live} of {budget}");
        if name == "vit-b16" {
            assert_eq!((batch.images, live), (128, 128 * 197));
        }
        let Patches::U8(pixels) = &batch.patches else { panic!("{name} has no pixels") };
        let rows: Vec<&[u8]> = pixels.chunks(batch.patch_dim).collect();
        let blank = |row: &[u8]| row.iter().all(|&x| x == 0);
        let prefix = batch.images * recipe.model.prefix();
        assert_eq!(rows.iter().filter(|row| blank(row)).count(), prefix + budget - live, "{name}");
    }
}

/// A whole step of a tiny model, and its parts.
#[test]
fn steps_give_lines_of_their_tables() {
    let small = ["width=16", "depth=2", "mlp=24", "heads=1", "head_dim=64", "drop_path=0.1"];
    let mut sets: Vec<String> = small.iter().map(|set| format!("model.{set}")).collect();
    sets.push("packing.tokens=128".into());
    for device in devices().into_iter().take(1) {
        let gpu = Gpu::on(device).unwrap();
        let classes = step::classes("digits");
        let recipe = step::training::fitting(&gpu.device, "digits", &sets, classes).unwrap();
        assert_eq!(recipe.packing.tokens, 128);
        let before = gpu.device.allocated_bytes();
        let mut training = step::training::Training::open(&gpu.device, &recipe, classes, 4).unwrap();
        let lengths = |batch: &PackedBatch| batch.cu_seqlens.clone();
        let batches = training.batches();
        assert!(batches.len() == 4 && batches.windows(2).all(|two| lengths(&two[0]) != lengths(&two[1])));
        assert!(batches.iter().all(|batch| batch.live_tokens() > 96 && batch.weights[0] == 1.0));
        let runs = [training.run(1).unwrap(), training.run(1).unwrap()];
        assert!((runs[1].first_loss - 10.0f64.ln()).abs() < 0.7, "{runs:?}");
        let (line, profile) = step::lines(&gpu, "digits", &training, &runs).unwrap();
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), step::HEADER.split(',').count(), "{line}");
        assert_eq!(cells[..2], ["digits", "128"]);
        for number in &cells[2..12] {
            assert!(number.parse::<f64>().unwrap().is_finite(), "{line}");
        }
        let columns = step::profile::HEADER.split(',').count();
        let rows: Vec<Vec<&str>> = profile.iter().map(|line| line.split(',').collect()).collect();
        let of = |row: &Vec<&str>, column: usize| row[column].parse::<f64>().unwrap();
        let launches: f64 = rows.iter().map(|row| of(row, columns - 3)).sum();
        // Zeros, work lists and update, one at least each, and sums behind some of the nodes.
        assert!(launches as usize > training.engine().executor().launched().len() + 3, "{profile:?}");
        let share: f64 = rows.iter().map(|row| of(row, columns - 1)).sum();
        assert!((share - 1.0).abs() < 0.01, "{profile:?}");
        for operation in ["attention", "d attention", "zero gradients", "optimiser", "add d norm residual"] {
            assert!(rows.iter().any(|row| row[2].trim_matches('"') == operation), "{operation}: {profile:?}");
        }
        drop(training);
        assert_eq!(gpu.device.allocated_bytes(), before, "a training leaves nothing behind");
    }
}

/// Criterion's own loop, and the file beside its report.
#[test]
fn criterion_takes_the_samples() {
    let folder = tempfile::tempdir().unwrap();
    let table = table::Table::begin(folder.path(), "copy", table::HEADER).unwrap();
    for device in devices().into_iter().take(1) {
        let gpu = Gpu::on(device).unwrap();
        let (x, out) = (gpu.random(2, 64).unwrap(), gpu.room::<half::bf16>(2, 64).unwrap());
        let launch = |stream: &Stream, set: usize| {
            let params = CopyParams { out: out.ptr(set), x: x.ptr(set), size: 64 };
            // SAFETY: both parts hold 64 elements.
            unsafe { launch_copy(gpu.device.kernels(), stream.raw(), &params) }
        };
        let (kernel, shape) = ("copy, \"64\"".into(), "64".into());
        let case = Case { kernel, shape, operations: 0.0, bytes: 256.0, sets: 2, launch: &launch };
        let mut criterion = Criterion::default().output_directory(folder.path()).without_plots();
        let line = gpu.measure(&mut criterion, "copy", &case).unwrap();
        assert!(line.starts_with("\"copy, \"\"64\"\"\",64,"), "{line}");
        table.add(&line).unwrap();
        let text = std::fs::read_to_string(folder.path().join("copy.csv")).unwrap();
        assert_eq!(text, format!("{}\n{line}\n", table::HEADER));
        assert!(folder.path().join("gpu_copy").is_dir());
    }
}
