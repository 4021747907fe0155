//! One nvcc a source, as many at a time as there are jobs, and only what has changed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;
use std::{env, fs, thread};

use super::architectures::Target;
use super::find::Nvcc;
use crate::hash::fnv1a;
use crate::registry::Source;
use crate::{reuse, units};

/// A source to compile.
struct Job {
    stem: &'static str,
    file: &'static str,
    options: Vec<String>,
    unit: PathBuf,
    /// Its name holds a hash of everything that it is made from.
    fatbin: PathBuf,
}

/// What became of a source.
pub struct Compiled {
    pub stem: String,
    pub fatbin: PathBuf,
    /// What it is compiled for, such as `sm_80`.
    pub architectures: Vec<String>,
}

/// Compiles what has changed, of all sources that there are targets for.
pub fn all(
    nvcc: &Nvcc,
    sources: &[(&Source, Vec<Target>)],
    kernels: &Path,
    out: &Path,
) -> Result<Vec<Compiled>, String> {
    let folder = out.join("kernels");
    let failed = |path: &Path, cause| format!("{} cannot be written: {cause}", path.display());
    fs::create_dir_all(&folder).map_err(|cause| failed(&folder, cause))?;
    let mut jobs = Vec::new();
    for (source, targets) in sources {
        let options = options(nvcc, targets);
        let (stem, text) = (source.stem(), units::unit(source));
        let all = units::contents(&text, kernels)
            .map_err(|cause| format!("kernels/{} cannot be read: {cause}", source.file))?;
        let flags =
            ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"].map(|name| env::var(name).unwrap_or_default());
        let key = fnv1a(format!("{} {options:?} {flags:?}\n{all}", nvcc.version).as_bytes());
        let unit = folder.join(format!("{stem}.cu"));
        fs::write(&unit, text).map_err(|cause| failed(&unit, cause))?;
        jobs.push(Job {
            stem,
            file: source.file,
            options,
            unit,
            fatbin: folder.join(format!("{stem}-{key:016x}.fatbin")),
        });
    }
    clean(&folder, &jobs);
    let stale: Vec<&Job> = jobs.iter().filter(|job| !job.fatbin.is_file() && !borrow(job, out)).collect();
    run(nvcc, kernels, &stale)?;
    let names = |targets: &[Target]| targets.iter().map(|target| target.code.clone()).collect();
    let compiled = |(job, (_, targets)): (Job, &(&Source, Vec<Target>))| Compiled {
        stem: job.stem.into(),
        fatbin: job.fatbin,
        architectures: names(targets),
    };
    Ok(jobs.into_iter().zip(sources).map(compiled).collect())
}

/// What nvcc is told, apart from files and threads.
fn options(nvcc: &Nvcc, targets: &[Target]) -> Vec<String> {
    let mut options: Vec<String> =
        ["--fatbin", "-std=c++17", "-O3", "-lineinfo", "-Xptxas", "--warn-on-spills"]
            .map(String::from)
            .into();
    if nvcc.compresses() {
        options.push("--compress-mode=size".into());
    }
    for target in targets {
        options.push("-gencode".into());
        options.push(format!("arch={},code={}", target.arch, target.code));
    }
    options
}

/// Deletes fatbins that no source makes any more.
fn clean(folder: &Path, jobs: &[Job]) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if !jobs.iter().any(|job| job.unit == path || job.fatbin == path || seconds(&job.fatbin) == path) {
            // What cannot be deleted only takes room.
            let _ = fs::remove_file(path);
        }
    }
}

/// Takes the fatbin from another build.
fn borrow(job: &Job, out: &Path) -> bool {
    let name = job.fatbin.strip_prefix(out).unwrap_or(&job.fatbin);
    reuse::elsewhere(out, name).into_iter().any(|path| {
        fs::copy(seconds(&path), seconds(&job.fatbin)).is_ok()
            && fs::copy(path, temporary(job)).is_ok()
            && finish(job).is_ok()
    })
}

/// `program`, whose seconds of the processor go to the file `times` where there is a POSIX shell: those of the clock
/// tell how busy the machine was.
fn timed(program: &Path, times: &Path) -> Command {
    if cfg!(not(unix)) {
        return Command::new(program);
    }
    let mut command = Command::new("sh");
    command.args(["-c", r#""$@"; status=$?; times >"$0"; exit $status"#]).arg(times).arg(program);
    command
}

/// Sum of the second line of what the shell's `times` says, such as `1m2.50s 0m0.25s`: user and system time of
/// what it has run.
fn processor_seconds(text: &str) -> Option<f64> {
    let seconds = |word: &str| {
        let (minutes, seconds) = word.strip_suffix('s')?.split_once('m')?;
        Some(60.0 * minutes.parse::<f64>().ok()? + seconds.parse::<f64>().ok()?)
    };
    text.lines().nth(1)?.split_whitespace().map(seconds).sum()
}

/// The file beside a fatbin that tells how many seconds of the processor nvcc took.
pub fn seconds(fatbin: &Path) -> PathBuf {
    fatbin.with_extension("seconds")
}

/// A fatbin is written under another name first, so that one that is there is whole.
fn temporary(job: &Job) -> PathBuf {
    job.fatbin.with_extension("part")
}

fn finish(job: &Job) -> std::io::Result<()> {
    fs::rename(temporary(job), &job.fatbin)
}

fn run(nvcc: &Nvcc, kernels: &Path, jobs: &[&Job]) -> Result<(), String> {
    let cores = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).filter(|n| *n > 0).unwrap_or(1);
    let workers = cores.min(jobs.len());
    // Targets of one source beside each other, where there are more cores than sources.
    let threads = cores.checked_div(workers).unwrap_or(1).max(1);
    let queue = Mutex::new(jobs.iter());
    let errors = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(job) = queue.lock().ok().and_then(|mut queue| queue.next().copied()) {
                    if let Err(error) = compile(nvcc, threads, kernels, job)
                        && let Ok(mut errors) = errors.lock()
                    {
                        errors.push(error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

fn compile(nvcc: &Nvcc, threads: usize, kernels: &Path, job: &Job) -> Result<(), String> {
    let failed = |what: String| {
        let file = job.file;
        format!("kernels/{file} does not compile for the GPU (TRENCADIS_NO_CUDA=1 builds without):\n{what}")
    };
    let (start, times) = (Instant::now(), job.fatbin.with_extension("times"));
    let done = timed(&nvcc.path, &times)
        .args(&job.options)
        .args(["--threads", &threads.to_string(), "-I"])
        .arg(kernels)
        .arg("-o")
        .arg(temporary(job))
        .arg(&job.unit)
        .output()
        .map_err(|cause| failed(format!("{} cannot be run: {cause}", nvcc.path.display())))?;
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if !done.status.success() {
        return Err(failed(said));
    }
    if let Some(line) = said.lines().find(|line| is_grave(line)) {
        return Err(failed(line.into()));
    }
    for line in said.lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo::warning={}: {line}", job.stem);
    }
    let of_the_processor = fs::read_to_string(&times).ok().and_then(|text| processor_seconds(&text));
    let took = of_the_processor.unwrap_or_else(|| start.elapsed().as_secs_f64());
    fs::write(seconds(&job.fatbin), format!("{took:.1}\n"))
        .and_then(|()| finish(job))
        .map_err(|cause| failed(cause.to_string()))
}

/// Whether a word of ptxas means that a kernel for Hopper is not what it was written to be: matrix instructions that
/// wait for one another, registers that stay where they are.
pub fn is_grave(line: &str) -> bool {
    let serialized = line.contains("wgmma.mma_async instructions are serialized");
    serialized || (line.contains("setmaxnreg") && line.contains("ignored"))
}

#[cfg(test)]
mod tests {
    use super::{is_grave, processor_seconds};

    #[test]
    fn what_ptxas_must_not_say() {
        for (line, grave) in [
            (
                "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
                 non wgmma instructions reading accumulator registers",
                true,
            ),
            (
                "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine \
                 register count at entry.",
                true,
            ),
            ("ptxas info    : (C7519) warpgroup.arrive is injected in around line 7", false),
            ("ptxas info    : Used 168 registers", false),
        ] {
            assert_eq!(is_grave(line), grave, "{line}");
        }
    }

    #[test]
    fn what_the_shell_says_of_times() {
        assert_eq!(processor_seconds("0m0.00s 0m0.00s\n1m2.50s 0m0.250000s\n"), Some(62.75));
        assert_eq!(processor_seconds("0m0.00s 0m0.00s\n"), None);
        assert_eq!(processor_seconds("0m0.00s 0m0.00s\nsoon 0m1s\n"), None);
    }
}
