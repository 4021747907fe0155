//! Measuring kernels on a GPU: time by events, operands rotated through more memory than the L2 cache holds,
//! random data, and the device's own peaks, measured in the same run.

pub mod clocks;
pub mod table;
pub mod tune;

use std::cell::{OnceCell, RefCell};
use std::time::Duration;

use bytemuck::Pod;
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;
use trencadis::device::{Buffer, Device, Graph, Ptr, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::measure::{self, MMA_VALUES, Rates};
use trencadis::{Error, Result};

use clocks::{Clocks, Reading};
use table::{Row, Table};

/// Samples of a case. Criterion takes them after its warm-up, so they are the last ones.
const SAMPLES: usize = 20;
/// Fewest launches of a captured graph: their gaps then weigh little.
const GRAPH_LAUNCHES: usize = 16;
/// Operands are spread over so many times the L2 cache.
const CACHES: usize = 3;

/// A device to measure on.
pub struct Gpu {
    pub device: Device,
    pub stream: Stream,
    pub peaks: Rates,
    pub clocks: Clocks,
}

/// Queues one run on a set of operands.
pub type Queue<'a> = dyn Fn(&Stream, usize) -> Result<()> + 'a;

/// One kernel, or chain of kernels, and shape.
pub struct Case<'a> {
    /// Name of the kernel or of what it computes.
    pub kernel: String,
    /// Sizes.
    pub shape: String,
    /// Useful floating-point operations of a run; 0 where bandwidth is what counts.
    pub operations: f64,
    /// Bytes that a run must move; 0 where operations are what counts.
    pub bytes: f64,
    /// Sets of operands.
    pub sets: usize,
    /// Queues one run on a set.
    pub launch: &'a Queue<'a>,
}

/// A case that is ready to be timed: so many launches at a time, on a GPU as one graph.
struct Prepared {
    graph: Option<Graph>,
    launches: usize,
}

/// Equal parts of a buffer, one a set of operands.
pub struct Rotated<T: Pod> {
    buffer: Buffer<T>,
    pitch: usize,
}

impl<T: Pod> Rotated<T> {
    /// The part of a set.
    pub fn ptr(&self, set: usize) -> Ptr<T> {
        self.buffer.ptr().offset(set * self.pitch)
    }

    /// The first `len` elements.
    ///
    /// # Errors
    /// There are fewer.
    pub fn into_buffer(self, len: usize) -> Result<Buffer<T>> {
        self.buffer.view(0..len * size_of::<T>())
    }

    /// All sets.
    ///
    /// # Errors
    /// The device has failed.
    pub fn download(&self) -> Result<Vec<T>> {
        self.buffer.download()
    }

    /// Writes a value over all sets, from the host.
    ///
    /// # Errors
    /// The device has failed.
    pub fn fill(&self, stream: &Stream, value: T) -> Result<()> {
        let len = self.buffer.len();
        let bytes = len * size_of::<T>();
        self.buffer.view(0..bytes)?.write(stream, &vec![value; len])
    }

    /// Rows within the part of a set: row `r` begins at its element `offset + r·stride`.
    pub fn rows(&self, set: usize, offset: usize, stride: usize) -> Rows<'_, T> {
        Rows { buffer: &self.buffer, offset: set * self.pitch + offset, stride }
    }
}

impl Gpu {
    /// GPU 0.
    ///
    /// # Errors
    /// Why there is none.
    pub fn open() -> Result<Self> {
        Self::on(Device::cuda(0)?)
    }

    /// Any device, after its peaks are known.
    ///
    /// # Errors
    /// The device has failed.
    pub fn on(device: Device) -> Result<Self> {
        let stream = device.stream()?;
        let peaks = measure::rates(&stream, &normal(MMA_VALUES, bf16::from_f32))?;
        Ok(Self { device, stream, peaks, clocks: Clocks::start() })
    }

    /// Whether this is a GPU and not the emulator, whose times say nothing.
    pub fn is_real(&self) -> bool {
        self.device.info().driver.is_some()
    }

    /// Seconds of what `launch` queues, by events.
    ///
    /// # Errors
    /// A launch that is refused, a device that fails.
    pub fn seconds(&self, launch: &dyn Fn() -> Result<()>) -> Result<f64> {
        measure::seconds(&self.stream, launch)
    }

    /// Sets of operands of `bytes` each that together exceed the cache.
    pub fn sets(&self, bytes: usize) -> usize {
        let wanted = (CACHES * self.device.info().l2_bytes).div_ceil(bytes.max(1)) + 1;
        let room = self.device.info().memory_bytes / 2 / bytes.max(1);
        wanted.min(room).clamp(1, if self.is_real() { 4096 } else { 2 })
    }

    /// Normally distributed values for every set, which repeat after about 2^20.
    ///
    /// # Errors
    /// The device has no room.
    pub fn random(&self, sets: usize, len: usize) -> Result<Rotated<bf16>> {
        self.random_of(sets, len, bf16::from_f32)
    }

    /// The same of elements of 16 bits that `of` makes.
    ///
    /// # Errors
    /// The device has no room.
    pub fn random_of<T: Pod>(&self, sets: usize, len: usize, of: fn(f32) -> T) -> Result<Rotated<T>> {
        let pitch = len.next_multiple_of(128);
        let buffer: Buffer<T> = self.device.alloc(sets * pitch)?;
        // Gigabytes would take seconds from the host.
        measure::fill(&self.stream, &buffer, &normal(buffer.len().min((1 << 20) - 8 * 3), of))?;
        Ok(Rotated { buffer, pitch })
    }

    /// Zeros for every set: results, workspaces, statistics.
    ///
    /// # Errors
    /// The device has no room.
    pub fn room<T: Pod>(&self, sets: usize, len: usize) -> Result<Rotated<T>> {
        let pitch = len.next_multiple_of(128);
        Ok(Rotated { buffer: self.device.zeros(sets * pitch)?, pitch })
    }

    /// Begins `<name>.csv`, and says where it is and what it is measured on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(&self, name: &str, header: &str) -> Result<Table> {
        let table = Table::begin(&table::folder(), name, header).map_err(Error::failure)?;
        println!(
            "{} (mma {:.0} TFLOP/s, copy {:.0} GB/s measured): {}",
            self.device.info().name,
            self.peaks.operations / 1e12,
            self.peaks.bytes / 1e9,
            table.path().display()
        );
        Ok(table)
    }

    /// Runs every set of a case once, and on a GPU captures as many launches as a graph should hold.
    ///
    /// # Errors
    /// A launch that is refused, a kernel that fails.
    fn prepare(&self, case: &Case<'_>) -> Result<Prepared> {
        for set in 0..case.sets {
            (case.launch)(&self.stream, set)?;
        }
        self.stream.synchronize()?;
        let launches = case.sets * GRAPH_LAUNCHES.div_ceil(case.sets);
        if !self.is_real() {
            return Ok(Prepared { graph: None, launches });
        }
        self.stream.begin_capture()?;
        let queued = (0..launches).try_for_each(|i| (case.launch)(&self.stream, i % case.sets));
        let graph = self.stream.end_capture()?;
        queued.map(|()| Prepared { graph: Some(graph), launches })
    }

    /// Seconds of `runs` runs, counted from at least one pass over the sets.
    fn time(&self, case: &Case<'_>, prepared: &Prepared, runs: u64) -> Result<f64> {
        let Prepared { graph, launches } = prepared;
        let repeats = runs.div_ceil(*launches as u64);
        let seconds = self.seconds(&|| {
            for _ in 0..repeats {
                match graph {
                    Some(graph) => graph.launch(&self.stream)?,
                    None => (0..*launches).try_for_each(|i| (case.launch)(&self.stream, i % case.sets))?,
                }
            }
            Ok(())
        })?;
        Ok(seconds * runs as f64 / (repeats * *launches as u64) as f64)
    }

    /// Measures a case without criterion: for tests of this room.
    ///
    /// # Errors
    /// As a launch.
    pub fn once(&self, case: &Case<'_>) -> Result<String> {
        let prepared = self.prepare(case)?;
        let seconds = self.time(case, &prepared, 1)?;
        Ok(self.line(case, seconds, 1))
    }

    /// The clocks since [`Clocks::restart`], and the driver.
    pub fn reading(&self) -> Reading {
        let mut reading = self.clocks.medians();
        if reading.driver.is_empty()
            && let Some(driver) = &self.device.info().driver
        {
            let (major, minor) = driver.cuda;
            reading.driver = driver.release.clone().unwrap_or_else(|| format!("for CUDA {major}.{minor}"));
        }
        reading
    }

    fn line(&self, case: &Case<'_>, seconds: f64, samples: usize) -> String {
        let row = Row { seconds, samples, clocks: self.reading() };
        table::line(case, &row, &self.peaks, &self.device.info().name)
    }

    fn prepared<'p>(&self, case: &Case<'_>, cell: &'p OnceCell<Prepared>) -> Result<&'p Prepared> {
        match cell.get() {
            Some(prepared) => Ok(prepared),
            None => self.prepare(case).map(|prepared| cell.get_or_init(|| prepared)),
        }
    }

    /// Measures a case with criterion. The line for the table, where criterion has taken all samples: it
    /// takes none of a case that is filtered out, and one where benchmarks are only tried.
    /// A launch that fails ends the program.
    pub fn measure(&self, criterion: &mut Criterion, family: &str, case: &Case<'_>) -> Option<String> {
        let samples = RefCell::new(Vec::new());
        let prepared = OnceCell::new();
        self.clocks.restart();
        let mut group = criterion.benchmark_group(format!("gpu_{family}"));
        group.sample_size(SAMPLES);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        group.throughput(match case.operations > 0.0 {
            true => Throughput::Elements(case.operations as u64),
            false => Throughput::Bytes(case.bytes as u64),
        });
        group.bench_function(BenchmarkId::new(&case.kernel, &case.shape), |bencher| {
            bencher.iter_custom(|runs| {
                let measured = self.prepared(case, &prepared).and_then(|p| self.time(case, p, runs));
                // Criterion cannot be told of an error.
                let seconds = measured.unwrap_or_else(|error| fail(family, &error));
                samples.borrow_mut().push(seconds / runs as f64);
                Duration::from_secs_f64(seconds)
            });
        });
        group.finish();
        let samples = samples.into_inner();
        if samples.len() < SAMPLES {
            return None;
        }
        let mut last = samples[samples.len() - SAMPLES..].to_vec();
        last.sort_by(f64::total_cmp);
        Some(self.line(case, (last[SAMPLES / 2] + last[(SAMPLES - 1) / 2]) / 2.0, SAMPLES))
    }
}

/// So many normally distributed values, the same for every number of them.
fn normal<T>(count: usize, of: fn(f32) -> T) -> Vec<T> {
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = rand_philox::Philox::from_u64_seed(count as u64);
    (0..count).map(|_| of(StandardNormal.sample(&mut rng))).collect()
}

/// What a family hands its cases to.
pub type Sink<'a> = dyn FnMut(&Case<'_>) -> Result<()> + 'a;

/// GPU 0; where there is none, says so.
pub fn open(family: &str) -> Option<Gpu> {
    Gpu::open().inspect_err(|reason| println!("gpu_{family} skipped: no GPU ({reason})")).ok()
}

/// Measures a family on GPU 0 into `<family>.csv`, or says that there is none.
pub fn family(criterion: &mut Criterion, name: &str, cases: impl FnOnce(&Gpu, &mut Sink<'_>) -> Result<()>) {
    let Some(gpu) = open(name) else { return };
    let outcome = gpu.begin(name, table::HEADER).and_then(|table| {
        cases(&gpu, &mut |case| match gpu.measure(criterion, name, case) {
            Some(line) => table.add(&line).map_err(Error::failure),
            None => Ok(()),
        })
    });
    if let Err(error) = outcome {
        fail(name, &error);
    }
}

/// Ends the program with what is wrong.
pub fn fail(family: &str, error: &Error) -> ! {
    eprintln!("gpu_{family}: {error}");
    std::process::exit(error.exit_code())
}
