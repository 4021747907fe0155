//! Names of GPU architectures as nvcc has them.

/// What a driver takes for a GPU of this compute capability: the newest machine code that runs on it, else
/// the newest PTX.
pub(super) fn best(architectures: &[String], capability: (u32, u32)) -> Option<&str> {
    let runs = architectures.iter().map(String::as_str).filter(|name| runs_on(name, capability));
    // "sm_" sorts after "compute_"; names of one kind that run on one GPU differ in their last digits only.
    runs.max_by_key(|name| (name.starts_with("sm_"), name.len(), *name))
}

/// Whether a GPU of this compute capability runs code for `architecture`: machine code (`sm_80`) within
/// its major version, from its minor version on; PTX (`compute_80`) on everything newer. The letter of
/// `sm_90a` ties the code to exactly that capability.
pub(super) fn runs_on(architecture: &str, capability: (u32, u32)) -> bool {
    let (machine_code, name) = match (architecture.strip_prefix("sm_"), architecture.strip_prefix("compute_"))
    {
        (Some(name), _) => (true, name),
        (_, Some(name)) => (false, name),
        _ => return false,
    };
    let digits = name.trim_end_matches(|c: char| c.is_ascii_lowercase());
    let Ok(number) = digits.parse::<u32>() else { return false };
    let least = (number / 10, number % 10);
    if digits.len() < name.len() {
        capability == least
    } else if machine_code {
        capability.0 == least.0 && capability.1 >= least.1
    } else {
        capability >= least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_stays_within_its_major_version_and_ptx_goes_on() {
        for (architecture, runs, refused) in [
            ("sm_80", &[(8, 0), (8, 6), (8, 9)][..], &[(7, 5), (9, 0), (12, 0)][..]),
            ("sm_90", &[(9, 0)], &[(8, 9), (10, 0)]),
            ("sm_90a", &[(9, 0)], &[(8, 0), (10, 0)]),
            ("sm_120", &[(12, 0), (12, 1)], &[(10, 0), (9, 0)]),
            ("compute_80", &[(8, 0), (9, 0), (10, 0), (12, 1)], &[(7, 5)]),
            ("compute_90a", &[(9, 0)], &[(10, 0)]),
            ("sm_x", &[], &[(8, 0)]),
            ("nonsense", &[], &[(8, 0)]),
        ] {
            assert!(runs.iter().all(|c| runs_on(architecture, *c)), "{architecture}");
            assert!(!refused.iter().any(|c| runs_on(architecture, *c)), "{architecture}");
        }
    }

    #[test]
    fn machine_code_goes_before_ptx() {
        let all = ["sm_80", "sm_90", "compute_80"].map(String::from);
        for (capability, code) in [
            ((8, 0), Some("sm_80")),
            ((8, 9), Some("sm_80")),
            ((9, 0), Some("sm_90")),
            ((10, 0), Some("compute_80")),
            ((12, 0), Some("compute_80")),
            ((7, 5), None),
        ] {
            assert_eq!(best(&all, capability), code, "{capability:?}");
        }
        assert_eq!(best(&["sm_90", "sm_90a"].map(String::from), (9, 0)), Some("sm_90a"));
    }
}
