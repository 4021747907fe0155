//! Which GPUs the kernels are compiled for.

use crate::registry::Tier;

/// One target of nvcc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// PTX that it goes through, such as `compute_80`.
    pub arch: String,
    /// What is kept: machine code (`sm_80`) or PTX (`compute_80`).
    pub code: String,
}

/// The targets of a tier; none where `CUDA_COMPUTE_CAP` leaves out what its kernels run on.
pub fn of_tier(tier: Tier, compute_cap: Option<&str>) -> Result<Vec<Target>, String> {
    let portable = targets(compute_cap)?;
    Ok(match tier {
        Tier::Sm80 => portable,
        Tier::Sm90 => {
            let hopper = portable.iter().any(|target| matches!(target.code.as_str(), "sm_90" | "sm_90a"));
            if hopper { vec![target("90a", "sm_90a")] } else { Vec::new() }
        }
    })
}

/// The targets of the portable tier: machine code for Ampere and Hopper, and PTX for what comes later.
/// `CUDA_COMPUTE_CAP` narrows them to machine code for the capabilities it lists, such as `90`, `9.0`,
/// `90a` or `80,90`.
pub fn targets(compute_cap: Option<&str>) -> Result<Vec<Target>, String> {
    let Some(list) = compute_cap.filter(|list| !list.trim().is_empty()) else {
        return Ok(vec![target("80", "sm_80"), target("90", "sm_90"), target("80", "compute_80")]);
    };
    let mut targets = Vec::new();
    for word in list.split(',') {
        let name = capability(word.trim()).ok_or_else(|| {
            format!(
                "CUDA_COMPUTE_CAP={list}: `{}` is no compute capability from 8.0 on; write it as 90, 9.0 or 90a, \
                 several with commas between",
                word.trim()
            )
        })?;
        let target = target(&name, &format!("sm_{name}"));
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    Ok(targets)
}

fn target(capability: &str, code: &str) -> Target {
    Target { arch: format!("compute_{capability}"), code: code.into() }
}

/// `90`, `9.0`, `90a`, `9.0a` as nvcc writes them: `90`, `90a`.
fn capability(word: &str) -> Option<String> {
    let digits = word.trim_end_matches(['a', 'f']);
    let letter = &word[digits.len()..];
    let number: u32 = match digits.split_once('.') {
        Some((major, minor)) if minor.len() == 1 => format!("{major}{minor}").parse().ok()?,
        Some(_) => return None,
        None => digits.parse().ok()?,
    };
    ((80..1000).contains(&number) && letter.len() < 2).then(|| format!("{number}{letter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(list: &str) -> Result<Vec<String>, String> {
        targets(Some(list))
            .map(|targets| targets.into_iter().map(|t| format!("{} {}", t.arch, t.code)).collect())
    }

    #[test]
    fn every_way_to_write_a_capability() {
        for (list, wanted) in [
            ("90", &["compute_90 sm_90"][..]),
            ("9.0", &["compute_90 sm_90"]),
            ("90a", &["compute_90a sm_90a"]),
            ("9.0a", &["compute_90a sm_90a"]),
            ("12.0", &["compute_120 sm_120"]),
            ("80, 9.0,90", &["compute_80 sm_80", "compute_90 sm_90"]),
            ("", &["compute_80 sm_80", "compute_90 sm_90", "compute_80 compute_80"]),
        ] {
            assert_eq!(codes(list).unwrap(), wanted, "{list}");
        }
        assert_eq!(targets(None), targets(Some(" ")));
    }

    #[test]
    fn kernels_for_hopper_are_compiled_for_it_alone() {
        for (list, compiled) in
            [(None, true), (Some("90"), true), (Some("80,9.0a"), true), (Some("80,120"), false)]
        {
            let targets = of_tier(Tier::Sm90, list).unwrap();
            let codes: Vec<_> = targets.iter().map(|target| target.code.as_str()).collect();
            assert_eq!(codes, if compiled { &["sm_90a"][..] } else { &[] }, "{list:?}");
            assert_eq!(of_tier(Tier::Sm80, list), super::targets(list));
        }
    }

    #[test]
    fn nonsense_and_gpus_that_are_too_old_are_named() {
        for list in ["75", "7.5", "sm_90", "native", "90,", "9.00", "90aa", "9", "-90"] {
            let message = codes(list).unwrap_err();
            assert!(message.starts_with(&format!("CUDA_COMPUTE_CAP={list}: `")), "{message}");
        }
    }
}
