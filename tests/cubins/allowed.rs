//! The exceptions that allowed.txt names.

/// One line of the list.
#[derive(Debug, PartialEq, Eq)]
pub struct Exception {
    pub kernel: String,
    pub arch: String,
    /// Which check it silences.
    pub what: String,
    pub reason: String,
}

/// Reads the list; an error is a sentence.
pub fn parse(text: &str) -> Result<Vec<Exception>, String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut words = line.split_whitespace();
            let mut next = || words.next().map(str::to_owned);
            let (Some(kernel), Some(arch), Some(what)) = (next(), next(), next()) else {
                return Err(format!(
                    "allowed.txt: expected `kernel architecture what reason`, found `{line}`"
                ));
            };
            let reason = words.collect::<Vec<_>>().join(" ");
            if reason.is_empty() {
                return Err(format!("allowed.txt: {kernel} {arch} {what} has no reason"));
            }
            Ok(Exception { kernel, arch, what, reason })
        })
        .collect()
}

#[test]
fn reads_exceptions() {
    let line = Exception {
        kernel: "gemm_bf16".into(),
        arch: "sm_80".into(),
        what: "stack".into(),
        reason: "one address, outside the loop".into(),
    };
    assert_eq!(parse("# why\n\n gemm_bf16 sm_80  stack one address, outside the loop\n"), Ok(vec![line]));
    assert!(parse("gemm_bf16 sm_80 stack").is_err());
    assert!(parse("gemm_bf16").is_err());
}
