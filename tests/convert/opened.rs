//! Foreign files where a model is asked for: by name, by a recipe, with mistakes.

use trencadis::eval::open::{Told, open};
use trencadis::weights::{foreign, resize};

use crate::*;

fn told<'a>(arch: Option<&'a str>, sets: &'a [String]) -> Told<'a> {
    Told { arch, sets, ..Told::default() }
}

/// Zeros in the shapes of a published network, without its size: two blocks.
fn published(width: usize, depth: usize, patch: usize, rows: usize) -> Weights {
    let mut tensors = std::collections::BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        tensors.insert(name, (shape.to_vec(), vec![0.0; shape.iter().product()]));
    };
    add("cls_token".into(), &[1, 1, width]);
    add("pos_embed".into(), &[1, rows, width]);
    add("patch_embed.proj.weight".into(), &[width, 3, patch, patch]);
    add("patch_embed.proj.bias".into(), &[width]);
    for n in 0..depth {
        for (part, rows, columns) in [
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 8, width),
            ("mlp.fc2", width, 8),
        ] {
            add(format!("blocks.{n}.{part}.weight"), &[rows, columns]);
            add(format!("blocks.{n}.{part}.bias"), &[rows]);
        }
        for norm in ["norm1", "norm2"] {
            add(format!("blocks.{n}.{norm}.weight"), &[width]);
            add(format!("blocks.{n}.{norm}.bias"), &[width]);
        }
    }
    add("norm.weight".into(), &[width]);
    add("norm.bias".into(), &[width]);
    add("head.weight".into(), &[3, width]);
    add("head.bias".into(), &[3]);
    Weights { tensors, ..Weights::default() }
}

#[test]
fn an_architecture_tells_what_the_file_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("w.safetensors");
    published(192, 12, 16, 197).save_atomic(&file).unwrap();
    let opened = open(&file, &told(Some("vit_tiny_patch16_224.augreg_in21k"), &[])).unwrap();
    let recipe = &opened.recipe;
    assert_eq!((recipe.model.heads, recipe.model.head_dim, recipe.model.mlp), (3, 64, 8));
    assert_eq!((recipe.data.mean.as_slice(), recipe.resolution.max), ([0.5].as_slice(), 224));
    assert_eq!(opened.origin.as_deref(), Some("timm-vit"));

    let message = |arch, sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let error = open(&file, &told(arch, &sets)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.starts_with(path(&file)), "{text}");
        text
    };
    let none = message(None, &[]);
    for part in ["--set model.heads=3", "--arch", "vit_tiny_patch16_224", "divisor of 192"] {
        assert!(none.contains(part), "{none}");
    }
    let other = message(Some("vit_small_patch16_224"), &[]);
    assert!(other.contains("has width 384, 12 blocks and 6 heads, the file width 192"), "{other}");
    let near = message(Some("vit_tiny_patch16_242"), &[]);
    assert!(near.contains("near it are vit_tiny_patch16_224"), "{near}");
    let names = message(Some("google/vit-base-patch16-224"), &[]);
    assert!(names.contains("names of timm's VisionTransformer"), "{names}");
    let wrong = message(Some("vit_tiny_patch16_224"), &["model.width=64"]);
    assert!(wrong.contains("the file width 64") || wrong.contains("expected"), "{wrong}");
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let told_of = |case: &str, change: &dyn Fn(&mut Weights)| {
        let mut file = weights(case);
        change(&mut file);
        let error = foreign::detect_and_convert(file, &mut model(case)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let rename = |w: &mut Weights, from: &str, to: &str| {
        let tensor = w.tensors.remove(from).unwrap();
        w.tensors.insert(to.into(), tensor);
    };
    let message = told_of("hf_vit", &|w| {
        rename(w, "vit.layernorm.weight", "vit.layrnorm.weight");
        w.tensors.remove("vit.encoder.layer.1.attention.attention.key.bias");
        w.tensors.insert("vit.embeddings.cls_token".into(), (vec![1, 1, 17], vec![0.0; 17]));
        w.tensors.insert("classifier.scale".into(), (vec![1], vec![0.0]));
    });
    for part in [
        "weights of transformers' ViT: ",
        "vit.embeddings.cls_token [1, 1, 17] (expected [1, 1, 16])",
        "missing: encoder.layer.1.attention.attention.key.bias",
        "layernorm.weight (nearest in the file: vit.layrnorm.weight)",
        "unexpected: classifier.scale",
        "vit.layrnorm.weight (nearest known: ",
    ] {
        assert!(message.contains(part), "{message}");
    }

    // Sizes are those that most tensors have, so that one wrong tensor is one mistake.
    let message = told_of("vit_cls", &|w| {
        w.tensors.insert("blocks.0.norm1.weight".into(), (vec![31], vec![0.0; 31]));
    });
    let expected = "of another shape: blocks.0.norm1.weight [31] (expected [32])";
    assert!(message.ends_with(expected), "{message}");

    let message = told_of("naflex_gap", &|w| {
        w.tensors.get_mut("blocks.1.mlp.fc1.bias").unwrap().1[7] = f32::NAN;
        w.tensors.get_mut("head.weight").unwrap().1[2] = f32::INFINITY;
    });
    for part in ["blocks.1.mlp.fc1.bias (NaN at element 7)", "head.weight (inf at element 2)"] {
        assert!(message.contains(part), "{message}");
    }

    let message = told_of("hf_dinov2", &|w| {
        w.tensors.insert("encoder.layer.0.mlp.weights_in.weight".into(), (vec![1], vec![0.0]));
    });
    assert!(message.contains("encoder.layer.0.mlp.weights_in.weight: a gated MLP (SwiGLU"), "{message}");
    let message = told_of("hf_dinov2", &|w| {
        w.tensors.insert("classifier.weight".into(), (vec![3, 32], vec![0.0; 96]));
    });
    assert!(message.contains("the cls token and the mean of the patches"), "{message}");
    let message = told_of("vit_cls", &|w| {
        w.tensors.insert("blocks.0.attns.0.norm.weight".into(), (vec![32], vec![0.0; 32]));
    });
    assert!(message.contains("ParallelThingsBlock"), "{message}");
}

/// Settings without a counterpart in a file, such as those of a pooling head that is not there, are no difference.
#[test]
fn a_recipe_takes_the_weights_of_its_network() {
    let sets = [
        "model.shape=\"\"",
        "model.width=32",
        "model.depth=2",
        "model.mlp=64",
        "model.heads=2",
        "model.patch=4",
    ];
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let mut target = Recipe::load("vit-s16", &sets).unwrap().model;
    // As many places as the table has, of another grid.
    (target.position.rows, target.position.columns) = (1, 25);
    let (start, described) = foreign::initial(weights("vit_cls"), &target).unwrap();
    assert_eq!((described.position.rows, described.position.columns), (5, 5));
    assert_eq!(start.tensors["position.table"].0, [25, 32]);
    (target.position.rows, target.position.columns) = (5, 5);
    assert_eq!(described.differences(&target).unwrap(), [] as [String; 0]);

    // What the implementation always has, though no tensor tells.
    target.norm_eps = 1e-3;
    let (_, described) = foreign::initial(weights("vit_cls"), &target).unwrap();
    let differences = described.differences(&target).unwrap();
    assert!(matches!(&differences[..], [one] if one.starts_with("model.norm_eps is ")), "{differences:?}");

    // The weights replace the first value of LayerScale, but not whether there is one.
    let scaled = |layer_scale| ModelConfig { layer_scale, ..ModelConfig::default() };
    assert_eq!(scaled(1e-5).differences(&scaled(1e-4)).unwrap(), [] as [String; 0]);
    assert_eq!(scaled(1e-5).differences(&scaled(0.0)).unwrap().len(), 1);
    // The pooling head's settings count where there is one.
    let normed = |pool_qk_norm| ModelConfig { pool_qk_norm, ..ModelConfig::default() };
    assert_eq!(normed(true).differences(&normed(false)).unwrap().len(), 1);
}

#[test]
fn a_flat_table_of_no_known_grid_is_not_resized() {
    let mut described = model("vit_pytorch_cls");
    let converted = foreign::convert(weights("vit_pytorch_cls"), &mut described).unwrap();
    let mut own = converted.weights;
    let count = own.tensors["position.table"].0[0];
    let mut target = described.clone();
    (described.position.rows, described.position.columns) = (count, 1);
    (target.position.rows, target.position.columns) = (2, 3);
    let error = resize::fit(&mut own, &mut described, &target).unwrap_err().to_string();
    assert!(error.contains("is not known") && error.contains("model.position.rows"), "{error}");
}

#[test]
fn integers_that_are_no_weights_are_not_read() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("w.safetensors");
    let source = weights("hf_siglip");
    let bytes: Vec<_> = source
        .tensors
        .iter()
        .map(|(name, (shape, values))| {
            (name.as_str(), shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        })
        .collect();
    let indices: Vec<u8> = (0..25i64).flat_map(i64::to_le_bytes).collect();
    let write = |name: &str| {
        let views = bytes.iter().map(|(n, s, b)| (*n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
        let integers = TensorView::new(Dtype::I64, vec![1, 25], &indices).unwrap();
        let all = views.chain(std::iter::once((name, integers)));
        std::fs::write(&file, safetensors::serialize(all, None).unwrap()).unwrap();
    };
    let sets = ["model.heads=2".to_owned()];
    write("vision_model.embeddings.position_ids");
    let opened = open(&file, &told(None, &sets)).unwrap();
    let expected = foreign::convert(source.clone(), &mut model("hf_siglip")).unwrap().weights;
    assert_same("hf_siglip", &opened.weights, &expected);
    // Of a place in the network, they are no numbers that it could have.
    write("vision_model.embeddings.something");
    let error = open(&file, &told(None, &sets)).unwrap_err().to_string();
    assert!(error.contains("vision_model.embeddings.something") && error.contains("I64"), "{error}");
}

/// big_vision can keep its blocks in one tensor each, and has a network without a table of positions.
#[test]
fn scanned_blocks_are_opened_as_single_ones() {
    let folder = tempfile::tempdir().unwrap();
    let [single, scanned] =
        ["single.safetensors", "scanned.safetensors"].map(|name| folder.path().join(name));
    let mut file = weights("big_vision_sincos");
    file.save_atomic(&single).unwrap();
    let first: Vec<String> =
        file.tensors.keys().filter(|name| name.contains("encoderblock_0/")).cloned().collect();
    assert!(!first.is_empty());
    for name in first {
        let (mut shape, mut values) = file.tensors.remove(&name).unwrap();
        values.extend(file.tensors.remove(&name.replace("encoderblock_0/", "encoderblock_1/")).unwrap().1);
        shape.insert(0, 2);
        file.tensors.insert(name.replace("encoderblock_0/", "encoderblock/"), (shape, values));
    }
    file.save_atomic(&scanned).unwrap();
    let [single, scanned] = [single, scanned].map(|path| open(&path, &told(None, &[])).unwrap());
    assert_eq!(scanned.recipe, single.recipe);
    assert_same("big_vision_sincos", &scanned.weights, &single.weights);
    let model = &scanned.recipe.model;
    assert_eq!((model.depth, model.gelu), (2, trencadis::recipe::GeluKind::Tanh));
    // Images of 224 pixels, which nothing in the file tells.
    assert_eq!((model.position.rows, model.position.columns, scanned.recipe.resolution.max), (56, 56, 224));
}

#[test]
fn settings_beyond_all_bounds_are_refused() {
    for (case, sets) in [
        ("vit_cls", &["model.heads=2", "model.patch=5000"][..]),
        ("vit_cls", &["model.heads=2", "model.patch=0"]),
        ("vit_cls", &["model.heads=2", "model.patch=9000000000000000000"]),
        ("big_vision_sincos", &["model.position.rows=100000000000"]),
        ("big_vision_sincos", &["model.position.rows=60000", "model.position.columns=60000"]),
    ] {
        let file = golden(&format!("{case}/weights.safetensors"));
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let error = open(&file, &told(None, &sets)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with(path(&file)), "{error}");
    }
}

#[test]
fn errors_name_the_file_that_is_wrong_once() {
    let folder = tempfile::tempdir().unwrap();
    let ours = folder.path().join("ours.safetensors");
    let theirs = golden("vit_cls/weights.safetensors");
    let sets = ["model.heads=2".to_owned()];
    let opened = open(&theirs, &told(None, &sets)).unwrap();
    let mut checkpoint = opened.into_checkpoint().unwrap();
    checkpoint.tensors.get_mut("head.bias").unwrap().1[0] = f32::NAN;
    checkpoint.save_atomic(&ours).unwrap();
    let once = |file: &Path, error: trencadis::Error| {
        let text = error.to_string();
        assert!(text.starts_with(path(file)) && text.matches(path(file)).count() == 1, "{text}");
    };
    once(&ours, open(&ours, &told(None, &[])).unwrap_err());
    let classes = Some(vec!["one".to_owned()]);
    once(&theirs, open(&theirs, &Told { sets: &sets, classes, ..Told::default() }).unwrap_err());
    let absent = folder.path().join("absent.toml");
    once(&absent, open(&theirs, &Told { config: Some(path(&absent)), ..Told::default() }).unwrap_err());
}

/// Wrappers put words before all names.
#[test]
fn wrapped_names_are_the_same() {
    let images = images();
    for (case, prefix) in [("vit_cls", "module."), ("hf_vit_model", "vit."), ("siglip2", "_orig_mod.")] {
        let mut wrapped = weights(case);
        wrapped.tensors =
            wrapped.tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect();
        let recipe = Recipe { model: model(case), ..Recipe::default() };
        let plain = forward::run(weights(case), &recipe, &images, None).unwrap();
        assert_eq!(forward::run(wrapped, &recipe, &images, None).unwrap().logits, plain.logits, "{case}");
    }
}
