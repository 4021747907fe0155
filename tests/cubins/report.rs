//! What the build wrote down about its fatbins: `OUT_DIR/fatbins.tsv`.

use std::path::{Path, PathBuf};

/// The fatbin of one source.
#[derive(Debug, PartialEq)]
pub struct Fatbin {
    pub stem: String,
    pub file: PathBuf,
    /// What it holds: machine code such as `sm_90`, PTX such as `compute_80`.
    pub targets: Vec<String>,
    /// Seconds of the processor when it was compiled, which may have been in an earlier build.
    pub seconds: f64,
}

/// The whole report.
#[derive(Debug, PartialEq)]
pub struct Report {
    pub nvcc: PathBuf,
    pub fatbins: Vec<Fatbin>,
}

impl Report {
    /// Reads the report; an error is a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut nvcc, mut fatbins) = (None, Vec::new());
        for line in text.lines() {
            match line.split('\t').collect::<Vec<_>>()[..] {
                ["nvcc", path] => nvcc = Some(PathBuf::from(path)),
                ["fatbin", stem, file, targets, seconds] => {
                    let seconds = seconds.parse().map_err(|_| format!("no number of seconds: `{line}`"))?;
                    let targets = targets.split(',').map(str::to_owned).collect();
                    fatbins.push(Fatbin { stem: stem.into(), file: file.into(), targets, seconds });
                }
                _ => return Err(format!("unknown line `{line}` in the build's report")),
            }
        }
        Ok(Self { nvcc: nvcc.ok_or("the build's report names no nvcc")?, fatbins })
    }

    /// The `cuobjdump` of the toolkit that compiled.
    pub fn cuobjdump(&self) -> Option<PathBuf> {
        let name = format!("cuobjdump{}", std::env::consts::EXE_SUFFIX);
        let beside = self.nvcc.parent().map(|bin| bin.join(&name));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates =
            beside.into_iter().chain(std::env::split_paths(&path).map(|folder| folder.join(&name)));
        candidates.into_iter().find(|file| Path::is_file(file))
    }
}

#[test]
fn reads_reports() {
    let text = "nvcc\t/opt/cuda/bin/nvcc\nfatbin\tsm80_gemm\t/g.fatbin\tsm_80,compute_80\t12.5\n";
    let targets = vec!["sm_80".to_owned(), "compute_80".to_owned()];
    let expected = Report {
        nvcc: "/opt/cuda/bin/nvcc".into(),
        fatbins: vec![Fatbin { stem: "sm80_gemm".into(), file: "/g.fatbin".into(), targets, seconds: 12.5 }],
    };
    assert_eq!(Report::parse(text), Ok(expected));
    assert!(Report::parse("").is_err());
    assert!(Report::parse("nvcc\tn\nfatbin\tsm80_gemm\t/g.fatbin\tsm_80\tsoon\n").is_err());
}
