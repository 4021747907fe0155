//! `trencadis convert`.

use trencadis::train::checkpoint;

use crate::*;

/// From a file of timm to one that describes itself, to the same logits without a recipe, and back.
#[test]
fn the_command_line_goes_round() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (ours, back, out) = (at("ours.safetensors"), at("back.safetensors"), at("out.safetensors"));
    let theirs = golden("vit_cls/weights.safetensors");
    let (done, text, error) = trencadis(&["convert", path(&theirs), path(&ours), "--set", "model.heads=2"]);
    assert!(done, "{error}");
    assert!(
        text.contains("timm's VisionTransformer") && text.contains("model.heads=2 model.gelu=erf"),
        "{text}"
    );

    let input = golden("images.safetensors");
    let (done, _, error) =
        trencadis(&["forward", "--weights", path(&ours), "--input", path(&input), "--output", path(&out)]);
    assert!(done, "{error}");
    let logits = &Weights::load(&out).unwrap().tensors["logits"].1;
    let expected = &Weights::load(&golden("vit_cls/expected.safetensors")).unwrap().tensors["logits"].1;
    assert!(logits.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{logits:?}");

    let (done, text, error) = trencadis(&["convert", path(&ours), path(&back), "--to", "timm"]);
    assert!(done, "{error}");
    assert!(text.contains("timm.models.VisionTransformer(patch_size=4"), "{text}");
    assert_same("vit_cls", &Weights::load(&back).unwrap(), &weights("vit_cls"));

    // A recipe of the network alone, whose batches are not made for it.
    let recipe = golden("vit_cls/config.toml");
    let (input, theirs, described) = (path(&input), path(&theirs), path(&recipe));
    let logits = logits.clone();
    for arguments in [
        &["convert", theirs, path(&back), "--config", described][..],
        &["forward", "--weights", theirs, "--config", described, "--input", input, "--output", path(&out)],
    ] {
        let (done, _, error) = trencadis(arguments);
        assert!(done, "{error}");
    }
    assert_eq!(Weights::load(&out).unwrap().tensors["logits"].1, logits);

    // It trains, too: the description is that of a recipe, and the positions of the cls token are in it.
    let header = checkpoint::load_header(&ours).unwrap();
    assert_eq!(header.classes, ["0", "1", "2", "3", "4", "5"]);
    let recipe = Recipe::from_toml(&header.recipe, &ours).unwrap();
    assert_eq!((recipe.model.width, recipe.resolution.max), (32, 20));
}

#[test]
fn half_precision_is_read_exactly_and_nothing_partial_is_left() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("half.safetensors"), folder.path().join("out.safetensors"));
    let source = weights("vit_reg_gap");
    let halves: Vec<_> = source
        .tensors
        .iter()
        .map(|(name, (shape, values))| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            (name, shape.clone(), bytes)
        })
        .collect();
    let views = halves.iter().map(|(n, s, b)| (*n, TensorView::new(Dtype::BF16, s.clone(), b).unwrap()));
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let sets = ["model.heads=2", "model.position.rows=4", "model.position.columns=6"];
    let mut arguments = vec!["convert", path(&file), path(&out), "--to", "timm"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let (done, _, error) = trencadis(&arguments);
    assert!(done, "{error}");
    let back = Weights::load(&out).unwrap();
    for (name, (_, values)) in &source.tensors {
        let expected = values.iter().map(|v| half::bf16::from_f32(*v).to_f32());
        assert!(back.tensors[name].1.iter().copied().eq(expected), "{name}");
    }

    let into = folder.path().join("there");
    std::fs::create_dir(&into).unwrap();
    let refused: &[&[&str]] =
        &[&["convert", path(&file), path(&into)], &["convert", path(&file), path(&out), "--arch", "x"]];
    let before = std::fs::read(&out).unwrap();
    for arguments in refused {
        let mut arguments = arguments.to_vec();
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let (done, _, error) = trencadis(&arguments);
        assert!(!done && error.starts_with("error: "), "{error}");
    }
    assert_eq!(std::fs::read(&out).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}
