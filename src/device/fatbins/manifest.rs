//! `manifest.txt`: what lies in a folder of exported kernels, a line each.
//!
//! ```text
//! format 2
//! trencadis 0.1.0
//! sources 8c7f3f5c0e2b9a41
//! compiler 13.0.88
//! architectures sm_80 sm_90 compute_80
//! fatbin sm80_gemm 123456 9a0b5cf1c2ae7741
//! kernel gemm_nt_bf16_128x128
//! ```
//!
//! The kernels of a fatbin follow its line, which tells bytes and hash.

use std::fmt::Write as _;

/// The one form that this version reads and writes.
const FORMAT: u32 = 2;

#[derive(Debug, PartialEq)]
pub(super) struct Manifest {
    /// Version of the program that exported them.
    pub trencadis: String,
    /// Hash of the kernels' sources, see [`SOURCES`](super::SOURCES).
    pub sources: String,
    /// Version of nvcc.
    pub compiler: String,
    pub architectures: Vec<String>,
    pub fatbins: Vec<Entry>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    /// Name without the ending `.fatbin`.
    pub stem: String,
    pub bytes: u64,
    /// FNV-1a of the contents, in hexadecimal.
    pub hash: String,
    pub kernels: Vec<String>,
}

impl Manifest {
    /// The file.
    pub(super) fn text(&self) -> String {
        let Self { trencadis, sources, compiler, architectures, fatbins } = self;
        let mut text = format!(
            "format {FORMAT}\ntrencadis {trencadis}\nsources {sources}\ncompiler {compiler}\narchitectures {}\n",
            architectures.join(" ")
        );
        for Entry { stem, bytes, hash, kernels } in fatbins {
            let _ = writeln!(text, "fatbin {stem} {bytes} {hash}");
            for kernel in kernels {
                let _ = writeln!(text, "kernel {kernel}");
            }
        }
        text
    }

    /// What a file says, or what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let mut value = |key: &str| {
            let line = lines.next().unwrap_or_default();
            let value = line.strip_prefix(key).and_then(|rest| rest.strip_prefix(' '));
            value
                .map(String::from)
                .ok_or_else(|| none(format_args!("`{key}` was expected and there is `{line}`")))
        };
        let format = value("format")?;
        if format != FORMAT.to_string() {
            return Err(format!(
                "has format {format} and this version reads {FORMAT}; export the kernels with this version"
            ));
        }
        let mut manifest = Self {
            trencadis: value("trencadis")?,
            sources: value("sources")?,
            compiler: value("compiler")?,
            architectures: value("architectures")?.split_whitespace().map(String::from).collect(),
            fatbins: Vec::new(),
        };
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            match (&words[..], manifest.fatbins.last_mut()) {
                (["fatbin", stem, bytes, hash], _) => manifest.fatbins.push(Entry {
                    stem: stem.to_string(),
                    bytes: bytes.parse().map_err(|_| none(format_args!("`{bytes}` is no size")))?,
                    hash: hash.to_string(),
                    kernels: Vec::new(),
                }),
                (["kernel", name], Some(entry)) => entry.kernels.push(name.to_string()),
                _ => return Err(none(format_args!("`{line}` is neither a fatbin nor a kernel of one"))),
            }
        }
        Ok(manifest)
    }
}

fn none(what: std::fmt::Arguments<'_>) -> String {
    format!("is no manifest of kernels ({what}); export them again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let entry = |stem: &str, kernels: &[&str]| Entry {
            stem: stem.into(),
            bytes: 12,
            hash: "00ff".into(),
            kernels: kernels.iter().map(|name| name.to_string()).collect(),
        };
        let manifest = Manifest {
            trencadis: "0.1.0".into(),
            sources: "abc".into(),
            compiler: "13.0.1".into(),
            architectures: vec!["sm_80".into(), "compute_80".into()],
            fatbins: vec![entry("a", &["x", "y"]), entry("b", &[])],
        };
        assert_eq!(Manifest::parse(&manifest.text()).unwrap(), manifest);
    }

    #[test]
    fn what_is_no_manifest_is_told() {
        let head = "format 2\ntrencadis 1\nsources 2\ncompiler 3\narchitectures sm_80\n";
        assert!(Manifest::parse(head).unwrap().fatbins.is_empty());
        for (text, part) in [
            ("", "(`format` was expected and there is ``)"),
            ("{\n", "(`format` was expected and there is `{`)"),
            ("format 1\n", "has format 1 and this version reads 2"),
            ("format 2\nsources 1\n", "(`trencadis` was expected and there is `sources 1`)"),
            (&format!("{head}kernel x\n"), "(`kernel x` is neither"),
            (&format!("{head}fatbin a 1x 2\n"), "(`1x` is no size)"),
            (&format!("{head}fatbin a 1\n"), "(`fatbin a 1` is neither"),
        ] {
            let error = Manifest::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
