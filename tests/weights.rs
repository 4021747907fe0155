//! Weights in and out of files, and fitted to a model.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use trencadis::autograd::ParamSpec;
use trencadis::autograd::graph::Init;
use trencadis::weights::{Policy, Tensors, Weights, assign};

fn example() -> Weights {
    let tensor = |shape: &[usize]| {
        let len = shape.iter().product::<usize>();
        (shape.to_vec(), (0..len).map(|i| (i as f32 - 2.5) / 3.0).collect())
    };
    Weights {
        tensors: [
            ("a.weight", tensor(&[70_000, 2])),
            ("b", tensor(&[])),
            ("empty", tensor(&[0, 3])),
            ("c", tensor(&[5])),
        ]
        .map(|(name, tensor)| (name.to_string(), tensor))
        .into(),
        metadata: BTreeMap::from([("recipe".into(), "x = \"é\"\n".into()), ("classes".into(), "[]".into())]),
    }
}

fn message(path: &Path) -> String {
    let error = Weights::load(path).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    text
}

#[test]
fn round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let weights = example();
    weights.save_atomic(&path).unwrap();
    assert_eq!(Weights::load(&path).unwrap(), weights);
    assert_eq!(Tensors::load_metadata(&path).unwrap(), weights.metadata);
    let some = Weights::load_where(&path, |name| name == "c" || name == "b").unwrap();
    assert_eq!(some.tensors["c"], weights.tensors["c"]);
    assert_eq!(some.tensors.len(), 2);

    let bytes = std::fs::read(&path).unwrap();
    weights.save_atomic(&path).unwrap();
    assert_eq!(bytes, std::fs::read(&path).unwrap(), "the same content gives the same bytes");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    // The reference implementation agrees, and finds the data aligned.
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.tensor("a.weight").unwrap().shape(), [70_000, 2]);
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
}

#[test]
fn other_types_become_f32() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    let values = [1.0f32, -0.15625, 65_504.0, 1.0 / 3.0];
    let f16: Vec<u8> = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let bf16: Vec<u8> = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let f64: Vec<u8> = values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let view = |dtype, data| TensorView::new(dtype, vec![2, 2], data).unwrap();
    let tensors = [
        ("f16", view(Dtype::F16, &f16)),
        ("bf16", view(Dtype::BF16, &bf16)),
        ("f64", view(Dtype::F64, &f64)),
    ];
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let weights = Weights::load(&path).unwrap();
    assert_eq!(weights.tensors["f64"], (vec![2, 2], values.to_vec()));
    assert_eq!(weights.tensors["f16"].1, [1.0, -0.15625, 65_504.0, 0.333_251_95]);
    assert_eq!(weights.tensors["bf16"].1, [1.0, -0.15625, 65_536.0, 0.333_984_38]);
    assert!(weights.metadata.is_empty());

    let tensors = [("ids", TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap())];
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    assert!(message(&path).contains("tensor ids: has type I64, expected F32"), "{}", message(&path));
}

#[test]
fn every_damage_is_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    example().save_atomic(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;

    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        message(&path)
    };
    assert!(with(b"").contains("0 bytes"));
    assert!(with(b"PK\x03\x04 a zip archive").contains("is a zip file, but none of NumPy arrays"));
    assert!(with(b"no format at all").contains("does not start with the length of a header"));
    assert!(with(&whole[..header - 10]).contains("cut short"));
    assert!(with(&whole[..whole.len() - 1]).contains("describes"));
    assert!(with(&[&whole[..], b"x"].concat()).contains("describes"));
    let mut scrambled = whole.clone();
    scrambled[8..20].fill(0xff);
    assert!(with(&scrambled).contains("header is damaged"));
    for end in (0..header + 100).step_by(7) {
        with(&whole[..end]);
    }

    assert!(message(dir.path()).contains("is a folder"));
    assert!(message(&dir.path().join("absent")).contains("no such file"));
}

#[test]
fn a_place_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = example().save_atomic(&file.join("w.safetensors")).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("is not a folder"), "{error}");
}

fn spec(name: &str, shape: &[usize], head: bool) -> ParamSpec {
    ParamSpec { name: name.into(), shape: shape.into(), init: Init::Normal(1.0), decay: true, head }
}

fn model(classes: usize) -> Vec<ParamSpec> {
    vec![
        spec("position.row", &[4, 2], false),
        spec("position.column", &[4, 2], false),
        spec("blocks.0.mlp.weight", &[3, 2], false),
        spec("head.weight", &[classes, 2], true),
        spec("head.bias", &[classes], true),
    ]
}

fn weights_of(params: &[ParamSpec]) -> Weights {
    let tensors = params
        .iter()
        .enumerate()
        .map(|(i, p)| (p.name.clone(), (p.shape.clone(), vec![i as f32; p.len()])))
        .collect();
    Weights { tensors, metadata: BTreeMap::new() }
}

/// Values, number of taken parameters, names of fresh ones.
type Fitted = (Vec<Vec<f32>>, usize, Vec<String>);

fn fit(weights: Weights, params: &[ParamSpec], policy: Policy) -> Result<Fitted, String> {
    assign(Path::new("w.safetensors"), weights, params, policy)
        .map(|(values, report)| (values, report.taken, report.fresh))
        .map_err(|error| error.to_string())
}

#[test]
fn exact_takes_everything_in_order() {
    let mut params = model(10);
    let weights = weights_of(&params);
    params.reverse();
    let (values, taken, fresh) = fit(weights, &params, Policy::Exact).unwrap();
    assert_eq!(taken, 5);
    assert!(fresh.is_empty());
    for (i, (value, param)) in values.iter().zip(&params).enumerate() {
        assert_eq!(*value, vec![4.0 - i as f32; param.len()]);
    }
}

#[test]
fn exact_names_what_differs() {
    let params = model(10);
    let mut weights = weights_of(&params);
    weights.tensors.remove("head.bias");
    weights.tensors.insert("extra".into(), (vec![1], vec![0.0]));
    weights.tensors.insert("blocks.0.mlp.weight".into(), (vec![2, 3], vec![0.0; 6]));
    let error = fit(weights, &params, Policy::Exact).unwrap_err();
    for part in [
        "w.safetensors: ",
        "of another shape: blocks.0.mlp.weight [2, 3] (expected [3, 2])",
        "missing: head.bias",
        "unexpected: extra",
    ] {
        assert!(error.contains(part), "{error}");
    }

    let error = fit(Weights::default(), &params, Policy::Exact).unwrap_err();
    assert!(
        error
            .contains("missing: position.row, position.column, blocks.0.mlp.weight, head.weight, head.bias)"),
        "{error}"
    );
    // A list is bounded; what is left out is counted.
    let many: Vec<_> = (0..11).map(|n| spec(&format!("blocks.{n}.gain"), &[2], false)).collect();
    let error = fit(Weights::default(), &many, Policy::Exact).unwrap_err();
    assert!(error.contains("blocks.0.gain, ") && error.contains("blocks.7.gain and 3 more"), "{error}");
    assert!(!error.contains("blocks.8.gain"), "{error}");
}

#[test]
fn a_name_of_no_use_is_told_with_the_nearest_one() {
    let params = model(10);
    let mut weights = weights_of(&params);
    let tensor = weights.tensors.remove("blocks.0.mlp.weight").unwrap();
    weights.tensors.insert("blocks.0.mlp.wieght".into(), tensor);
    weights.tensors.insert("position.row".into(), (vec![9, 2], vec![0.0; 18]));
    let error = fit(weights, &params, Policy::Exact).unwrap_err();
    for part in [
        "missing: blocks.0.mlp.weight (nearest in the file: blocks.0.mlp.wieght)",
        "unexpected: blocks.0.mlp.wieght (nearest known: blocks.0.mlp.weight)",
        "set model.position.rows = 9",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_new_head_starts_afresh_and_the_rest_is_taken() {
    let seed = 5;
    let policy = Policy::NewHead { seed };
    let (values, taken, fresh) = fit(weights_of(&model(10)), &model(3), policy).unwrap();
    assert_eq!(taken, 3);
    assert_eq!(fresh, ["head.weight", "head.bias"]);
    assert_eq!(values[2], [2.0; 6]);
    assert_eq!(values[3..], trencadis::nn::init::initialise(&model(3), seed)[3..]);

    // The same number of classes: all is taken.
    let (values, taken, fresh) = fit(weights_of(&model(10)), &model(10), policy).unwrap();
    assert_eq!((taken, fresh.len()), (5, 0));
    assert_eq!(values[3], [3.0; 20]);

    // A head with other parts, or none, does not matter.
    let mut weights = weights_of(&model(10));
    weights.tensors.insert("head.scale".into(), (vec![1], vec![0.0]));
    weights.tensors.remove("head.bias");
    assert_eq!(fit(weights, &model(3), policy).unwrap().1, 3);
    assert_eq!(fit(weights_of(&model(10)[..3]), &model(3), policy).unwrap().1, 3);

    // A former head with a bias does not fit one without.
    let (_, taken, fresh) = fit(weights_of(&model(10)), &model(10)[..4], policy).unwrap();
    assert_eq!((taken, fresh), (3, vec!["head.weight".to_string()]));

    // Anything else must match.
    let mut weights = weights_of(&model(10));
    weights.tensors.insert("other.scale".into(), (vec![1], vec![0.0]));
    assert!(fit(weights, &model(3), policy).unwrap_err().contains("unexpected: other.scale"));
    assert!(
        fit(weights_of(&model(10)[1..]), &model(3), policy).unwrap_err().contains("missing: position.row")
    );
}

#[test]
fn position_tables_name_their_recipe_key() {
    for policy in [Policy::Exact, Policy::NewHead { seed: 0 }] {
        for (name, key) in [("position.row", "rows"), ("position.column", "columns")] {
            let mut weights = weights_of(&model(10));
            weights.tensors.insert(name.into(), (vec![9, 2], vec![0.0; 18]));
            let error = fit(weights, &model(10), policy).unwrap_err();
            let expected =
                format!("{name} has 9 rows and this recipe asks for 4; set model.position.{key} = 9");
            assert!(error.ends_with(&expected), "{error}");
        }
    }
    let joint = [spec("position.table", &[20, 2], false)];
    let other = weights_of(&[spec("position.table", &[56, 2], false)]);
    let error = fit(other, &joint, Policy::Exact).unwrap_err();
    assert!(
        error.contains("56 rows") && error.contains("asks for 20") && error.contains("product is 56"),
        "{error}"
    );
    // Another width is another model.
    let error =
        fit(weights_of(&[spec("position.table", &[20, 3], false)]), &joint, Policy::Exact).unwrap_err();
    assert!(error.contains("of another shape"), "{error}");
}
