//! To our names and back to timm's, and what timm has not.

use trencadis::recipe::PositionResample;
use trencadis::weights::foreign::{self, export};

use crate::*;

/// Every golden case whose names are timm's, and those of DeiT, which differ in LayerScale alone.
const TIMM: &[&str] = &[
    "naflex_gap",
    "naflex_gap_qk_norm",
    "naflex_par_gap",
    "naflex_factorized",
    "naflex_parfac",
    "naflex_map",
    "naflex_token",
    "naflex_siglip",
    "naflex_none",
    "naflex_avg_norm",
    "vit_cls",
    "vit_reg_gap",
    "vit_map",
    "vit_cls_reg_qk",
    "vit_cls_gap",
    "vit_headless",
    "vit_parallel",
    "vit_parallel_fused",
    "deit3",
];

#[test]
fn to_ours_and_back_to_timm_is_exact() {
    for case in TIMM {
        let mut described = model(case);
        let converted = foreign::convert(weights(case), &mut described).unwrap();
        let back = export::to_timm(converted.weights.clone(), &described, converted.origin, false).unwrap();
        let mut expected = weights(case);
        expected.tensors = expected
            .tensors
            .into_iter()
            .map(|(name, t)| (name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"), t))
            .collect();
        assert_same(case, &back.weights, &expected);
        let class = if case.starts_with("naflex") { "NaFlexVit(" } else { "VisionTransformer(" };
        assert!(back.call.contains(class), "{case}: {}", back.call);
        // And from there to ours once more.
        let again = foreign::convert(back.weights, &mut described).unwrap();
        assert_same(case, &again.weights, &converted.weights);
    }
}

#[test]
fn other_networks_become_those_of_timm() {
    let images = images();
    // (case, whether timm has the same network; else what it has not)
    let cases: &[(&str, &[&str])] = &[
        ("hf_vit", &[]),
        ("hf_dinov2", &[]),
        ("hf_dinov2_registers", &[]),
        ("dinov2", &[]),
        ("hf_siglip", &[]),
        ("hf_siglip_classifier", &[]),
        ("siglip2", &[]),
        ("big_vision_map", &[]),
        ("big_vision_tok", &[]),
        ("vit_jax", &[]),
        (
            "na_vit",
            &[
                "model.attention_scale = 1.0",
                "model.pool_residual = true",
                "model.position.coordinate = absolute",
            ],
        ),
        (
            "na_vit_nested",
            &["model.qk_norm = layernorm", "model.pool_query_norm = true", "model.pool_mlp = false"],
        ),
        ("vit_pytorch_cls", &["model.position.combination = flat"]),
        ("vit_pytorch_simple", &["model.position.coordinate = absolute"]),
    ];
    for (case, missing) in cases {
        let mut described = model(case);
        let converted = foreign::convert(weights(case), &mut described).unwrap();
        let exported = export::to_timm(converted.weights.clone(), &described, converted.origin, false);
        if !missing.is_empty() {
            let message = exported.unwrap_err().to_string();
            missing.iter().for_each(|part| assert!(message.contains(part), "{case}: {message}"));
            continue;
        }
        // timm's names, read as any other file of timm, give the same logits.
        let recipe = Recipe { model: described, ..Recipe::default() };
        let ours = forward::run(weights(case), &recipe, &images, None).unwrap();
        let timm = forward::run(exported.unwrap().weights, &recipe, &images, None).unwrap();
        assert_eq!(ours.logits, timm.logits, "{case}");
    }
}

/// What timm has no argument for is refused by its key; a filter, which matters on other grids alone, is told.
#[test]
fn what_timm_has_not_is_refused_or_told() {
    let export = |case: &str, naflex: bool, change: &dyn Fn(&mut ModelConfig, &mut Weights)| {
        let mut described = model(case);
        let mut converted = foreign::convert(weights(case), &mut described).unwrap();
        change(&mut described, &mut converted.weights);
        export::to_timm(converted.weights, &described, converted.origin, naflex)
    };
    let call =
        |case, naflex, resample| export(case, naflex, &|m, _| m.position.resample = resample).unwrap().call;
    for (case, naflex, resample, part) in [
        (
            "vit_cls",
            false,
            PositionResample::Bilinear,
            r#"by the filter "bicubic", not by model.position.resample = "bilinear""#,
        ),
        (
            "naflex_gap",
            true,
            PositionResample::BicubicOffset,
            r#"not by model.position.resample = "bicubic-offset""#,
        ),
        ("naflex_gap", true, PositionResample::BicubicNoAntialias, ", pos_embed_antialias=False)"),
        ("naflex_gap", true, PositionResample::Linear, "'bilinear', pos_embed_antialias=False)"),
        (
            "naflex_gap",
            true,
            PositionResample::LinearAlignCorners,
            "_antialias=False, pos_embed_align_corners=True)",
        ),
        ("naflex_gap", true, PositionResample::Bilinear, "pos_embed_interp_mode='bilinear')"),
        ("naflex_factorized", true, PositionResample::Bicubic, r#"by the filter "linear", not by"#),
    ] {
        let call = call(case, naflex, resample);
        assert!(call.contains(part), "{case}: {call}");
        assert_eq!(call.contains('#'), part.contains("not by"), "{case}: {call}");
    }
    for case in ["vit_cls", "naflex_gap", "naflex_factorized"] {
        assert!(!export(case, false, &|_, _| ()).unwrap().call.contains('#'), "{case}");
    }
    type Change = fn(&mut ModelConfig, &mut Weights);
    let refused: &[(&str, Change, &str)] = &[
        ("vit_cls_reg_qk", |m, _| m.qk_norm_eps = 1e-3, "model.qk_norm_eps unlike model.norm_eps"),
        ("vit_cls", |m, _| m.patch_bias = false, "model.patch_bias = false"),
        ("vit_parallel", |m, _| m.mlp_bias = false, "model.mlp_bias = false"),
        ("naflex_gap", |m, _| m.patch_norm_in = true, "model.patch_norm_in = true"),
        (
            "vit_cls",
            |_, w| drop(w.tensors.insert("position.prefix".into(), (vec![2, 32], vec![1.0; 64]))),
            "position.prefix is [2, 32], expected at most the 1 prefix tokens",
        ),
        ("vit_parallel", |m, _| m.proj_bias = false, "blocks.0.mlp.fc2.bias, which is not zero"),
    ];
    for (case, change, part) in refused {
        let message = export(case, false, change).unwrap_err().to_string();
        assert!(message.contains(part), "{case}: {message}");
    }
}

#[test]
fn branches_that_were_trained_apart_have_no_place_in_timm() {
    let mut described = model("vit_parallel_fused");
    let mut converted = foreign::convert(weights("vit_parallel_fused"), &mut described).unwrap();
    converted.weights.tensors.get_mut("blocks.1.scale2").unwrap().1[0] += 0.1;
    let error = export::to_timm(converted.weights, &described, converted.origin, false).unwrap_err();
    assert!(error.to_string().contains("blocks.1.scale1 and blocks.1.scale2"), "{error}");
}
