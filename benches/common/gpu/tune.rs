//! What tuners share: times of several plans side by side, and files for what they found.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use trencadis::{Error, Result};

use super::{Gpu, fail};

/// Seconds of a sample.
const SAMPLE: f64 = 3e-3;

impl Gpu {
    /// Median seconds of each of `plans` plans over `samples` samples, taken in turn, so that all meet the same clocks.
    /// `launch(plan, set)` queues a plan with one of `sets` sets of operands.
    ///
    /// # Errors
    /// A launch that is refused, a device that fails.
    pub fn medians(
        &self,
        plans: usize,
        sets: usize,
        samples: usize,
        launch: &dyn Fn(usize, usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let queue = |plan: usize, count: usize| (0..count).try_for_each(|i| launch(plan, i % sets));
        let mut counts = Vec::new();
        for plan in 0..plans {
            queue(plan, 1)?;
            let once = self.seconds(&|| queue(plan, sets))? / sets as f64;
            let most = if self.is_real() { 200 } else { 1 };
            counts.push(((SAMPLE / once).ceil() as usize).clamp(1, most));
        }
        let mut taken = vec![Vec::new(); plans];
        for _ in 0..samples {
            for (plan, (&count, taken)) in counts.iter().zip(&mut taken).enumerate() {
                taken.push(self.seconds(&|| queue(plan, count))? / count as f64);
            }
        }
        let median = |mut taken: Vec<f64>| {
            taken.sort_by(f64::total_cmp);
            taken[taken.len() / 2]
        };
        Ok(taken.into_iter().map(median).collect())
    }
}

/// Where the arguments of a bench ask for it by `--tune FOLDER`, tunes `family` on GPU 0 and says so: `run` writes the
/// lines of the table and returns the page, which go to `<stem>.csv` and `<stem>.md` in the folder. What goes wrong ends
/// the program.
pub fn asked(family: &str, stem: &str, run: impl FnOnce(&Gpu, &mut dyn Write) -> Result<String>) -> bool {
    let mut args = std::env::args_os().skip_while(|arg| arg != "--tune").skip(1);
    let Some(folder) = args.next() else { return false };
    if let Err(error) = write(Path::new(&folder), stem, run) {
        fail(family, &error);
    }
    true
}

fn write(folder: &Path, stem: &str, run: impl FnOnce(&Gpu, &mut dyn Write) -> Result<String>) -> Result<()> {
    let told = |file: &Path, cause| Error::failure(format!("{} cannot be written: {cause}", file.display()));
    let gpu = Gpu::open()?;
    std::fs::create_dir_all(folder).map_err(|cause| told(folder, cause))?;
    let [csv, page] = ["csv", "md"].map(|ending| folder.join(stem).with_extension(ending));
    let mut table = File::create(&csv).map_err(|cause| told(&csv, cause))?;
    let text = run(&gpu, &mut table)?;
    print!("{text}");
    std::fs::write(&page, text).map_err(|cause| told(&page, cause))
}
