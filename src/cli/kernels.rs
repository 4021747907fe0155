//! `trencadis kernels`: list the kernels or what they do, or write the compiled ones to a folder.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::print;
use crate::device::fatbins::{Fatbins, VARIABLE};
use crate::error::Result;
use crate::kernels::{matrix, registry};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write the compiled kernels of this build and their manifest to a folder.
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,

    /// Print what they do, for which sizes, on which GPUs and how exactly, as a table in markdown.
    #[arg(long, conflicts_with = "export")]
    matrix: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.matrix {
        return print(&matrix::markdown());
    }
    let Some(folder) = args.export else { return print(&list()) };
    let fatbins = Fatbins::embedded()?;
    fatbins.export(&folder)?;
    print(&format!(
        "exported          {} fatbins for {} to {}; {VARIABLE}={} makes another build use them\n",
        fatbins.len(),
        fatbins.architectures().join(", "),
        folder.display(),
        folder.display()
    ))
}

/// Every kernel below the file that it is in.
fn list() -> String {
    let mut text = String::new();
    for source in registry::sources() {
        let _ = writeln!(text, "kernels/{}", source.file);
        for kernel in &source.kernels {
            let _ = writeln!(text, "  {:<48}{:>5} threads", kernel.name, kernel.threads);
        }
    }
    text.push_str("trencadis inspect device tells whether there is compiled code for them.\n");
    text
}
