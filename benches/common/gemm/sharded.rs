//! Products whose rows come or go in chunks, beside copies on a second stream: one launch for all chunks, a launch for
//! each, the product alone and the copies alone.
//!
//! One GPU plays one rank of a ring: chunks are copied within its memory, so the copies take as long as its memory makes
//! them and not as links between GPUs would, and what is shown is that both go on at the same time. Nothing is captured:
//! two branches of a graph need not run beside each other.

use std::cell::RefCell;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;
use trencadis::device::{Buffer, Stream};
use trencadis::kernels::gemm::sharded::{Chunks, Done, Ready, ShardedGemm, ShardedPlan};
use trencadis::kernels::gemm::{Epilogue, Gemm, Layout, Matrix, Plan, Shape, Store, Vector};
use trencadis::{Error, Result};

use crate::common::gpu::{Gpu, fail, open, table};

/// Multiprocessors that are left to copies, which within one GPU may be kernels.
const RESERVE: u32 = 4;

/// Ranks of the ring.
const RANKS: usize = 8;

const SAMPLES: usize = 20;

/// Columns of the table.
pub const HEADER: &str = "product,shape,chunks,alone_us,copies_us,one_launch_us,launch_per_chunk_us,one_after_other_us,\
                          one_launch_over_alone,one_launch_over_launch_per_chunk,device,driver,sm_mhz,memory_mhz,watts,\
                          celsius";

/// Which rows move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moves {
    /// Those of the first operand come: all-gather into the product.
    In,
    /// Those of the result go: product into reduce-scatter.
    Out,
}

/// How they move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    Alone,
    Copies,
    OneLaunch,
    LaunchPerChunk,
    OneAfterOther,
}

pub const WAYS: [Way; 5] = [Way::Alone, Way::Copies, Way::OneLaunch, Way::LaunchPerChunk, Way::OneAfterOther];

/// The products of ViT-22B's layers on one of 8 ranks, over 8192 tokens in chunks of 1024: into the MLP and attention by
/// rows of the weight, out of them by columns, forward and backward.
fn shapes() -> Vec<(Shape, Moves)> {
    let (d, hidden, t) = (6144, 24_576, 8192);
    let shape = |layout, n, k| Shape { layout, m: t, n, k };
    vec![
        (shape(Layout::Nt, hidden / RANKS, d), Moves::In),
        (shape(Layout::Nt, 3 * d / RANKS, d), Moves::In),
        (shape(Layout::Nt, d, hidden / RANKS), Moves::Out),
        (shape(Layout::Nn, hidden / RANKS, d), Moves::In),
        (shape(Layout::Nn, d, hidden / RANKS), Moves::Out),
    ]
}

/// A product with what it needs on the device.
pub struct Moving<'a> {
    gpu: &'a Gpu,
    shape: Shape,
    moves: Moves,
    chunks: Chunks,
    plan: ShardedPlan,
    whole: Plan,
    of_chunk: Plan,
    second: Stream,
    a: Buffer<bf16>,
    b: Buffer<bf16>,
    out: Buffer<bf16>,
    /// Where chunks come from or go to.
    beside: Buffer<bf16>,
    ready: Ready,
    done: Done,
}

impl<'a> Moving<'a> {
    /// In so many chunks, which divide m.
    ///
    /// # Errors
    /// A shape that the kernels do not take, a device without room.
    pub fn new(gpu: &'a Gpu, shape: Shape, moves: Moves, count: usize) -> Result<Self> {
        let Shape { m, n, k, .. } = shape;
        let device = &gpu.device;
        let random = |len: usize| -> Result<Buffer<bf16>> { gpu.random(1, len)?.into_buffer(len) };
        let chunks = Chunks::new(m / count, (0..count).collect())?;
        let (a, b, out) = (random(m * k)?, random(n * k)?, device.alloc::<bf16>(m * n)?);
        let beside = random(if moves == Moves::In { m * k } else { m * n })?;
        let (ready, done) = (Ready::new(device, count)?, Done::new(device, count)?);
        let second = device.stream()?;
        let gemm = gemm(shape, &a, &b, 0);
        let epilogue = Epilogue::Store(Store::plain(Matrix::of(&out, 0, n)));
        let whole = gemm.plan(&epilogue, device.info())?;
        let plan = ShardedGemm { gemm, chunks: &chunks, ready: None, done: None }.plan(
            &epilogue,
            device.info(),
            RESERVE,
        )?;
        let of_chunk =
            Gemm { shape: Shape { m: m / count, ..shape }, ..gemm }.plan(&epilogue, device.info())?;
        Ok(Self { gpu, shape, moves, plan, whole, of_chunk, second, a, b, out, beside, ready, done, chunks })
    }

    fn copy(&self, stream: &Stream, chunk: usize) -> Result<()> {
        let (to, from) = match self.moves {
            Moves::In => (&self.a, &self.beside),
            Moves::Out => (&self.beside, &self.out),
        };
        let bytes = 2 * to.len() / self.chunks.len();
        let rows = chunk * bytes..(chunk + 1) * bytes;
        to.view::<bf16>(rows.clone())?.copy_from(stream, &from.view(rows)?)
    }

    fn multiply(&self, chunk: Option<usize>) -> Result<()> {
        let rows = self.chunks.rows();
        let (first, m, plan) = match chunk {
            None => (0, self.shape.m, &self.whole),
            Some(chunk) => (chunk * rows, rows, &self.of_chunk),
        };
        let gemm = gemm(Shape { m, ..self.shape }, &self.a, &self.b, first);
        let n = self.shape.n;
        let epilogue = Epilogue::Store(Store::plain(Matrix::of(&self.out, first * n, n)));
        gemm.launch(&self.gpu.stream, &epilogue, plan, &Vector::none())
    }

    /// Queues all of it, from the device's stream on and back to it. The first chunk of those that come, and the last of
    /// those that go, is the rank's own and is not copied.
    ///
    /// # Errors
    /// A launch that is refused, a device that fails.
    pub fn queue(&self, way: Way) -> Result<()> {
        let (stream, second, last) = (&self.gpu.stream, &self.second, self.chunks.len() - 1);
        let comes = self.moves == Moves::In;
        let copied = |chunk: usize| chunk != if comes { 0 } else { last };
        let order = || 0..=last;
        match way {
            Way::Alone => return self.multiply(None),
            Way::OneAfterOther if comes => {
                order().filter(|&chunk| copied(chunk)).try_for_each(|chunk| self.copy(stream, chunk))?;
                return self.multiply(None);
            }
            Way::OneAfterOther => {
                self.multiply(None)?;
                return order().filter(|&chunk| copied(chunk)).try_for_each(|chunk| self.copy(stream, chunk));
            }
            Way::Copies => {
                return order().filter(|&chunk| copied(chunk)).try_for_each(|chunk| self.copy(stream, chunk));
            }
            Way::OneLaunch | Way::LaunchPerChunk => {}
        }
        second.wait(&stream.record()?)?;
        if way == Way::LaunchPerChunk {
            for chunk in order() {
                if comes && copied(chunk) {
                    self.copy(second, chunk)?;
                    stream.wait(&second.record()?)?;
                }
                self.multiply(Some(chunk))?;
                if !comes && copied(chunk) {
                    second.wait(&stream.record()?)?;
                    self.copy(second, chunk)?;
                }
            }
            return stream.wait(&second.record()?);
        }
        let n = self.shape.n;
        for chunk in order() {
            if comes {
                if copied(chunk) {
                    self.copy(second, chunk)?;
                }
                self.ready.raise(second, chunk)?;
            } else {
                self.done.take(second, chunk, self.plan.writers(&self.chunks, n))?;
                if copied(chunk) {
                    self.copy(second, chunk)?;
                }
            }
        }
        let sharded = ShardedGemm {
            gemm: gemm(self.shape, &self.a, &self.b, 0),
            chunks: &self.chunks,
            ready: comes.then_some(&self.ready),
            done: (!comes).then_some(&self.done),
        };
        sharded.launch(stream, &Epilogue::Store(Store::plain(Matrix::of(&self.out, 0, n))), &self.plan)?;
        stream.wait(&second.record()?)
    }

    /// What is computed.
    pub fn name(&self) -> String {
        let layout = format!("{:?}", self.shape.layout).to_lowercase();
        let moves = if self.moves == Moves::In { "gather_gemm" } else { "gemm_scatter" };
        format!("{moves}_{layout}")
    }

    /// A line of the table, of the seconds of [`WAYS`].
    pub fn line(&self, seconds: [f64; 5]) -> String {
        let Shape { m, n, k, .. } = self.shape;
        let [alone, _, one, per_chunk, _] = seconds;
        let cells = [self.name(), format!("{m}x{n}x{k}"), self.chunks.len().to_string()];
        let ratios = [one / alone, one / per_chunk].map(|ratio| format!("{ratio:.3}"));
        let cells = cells
            .into_iter()
            .chain(seconds.map(|seconds| format!("{:.3}", seconds * 1e6)))
            .chain(ratios)
            .chain([self.gpu.device.info().name.clone()]);
        table::csv(cells.chain(table::clocks(&self.gpu.reading())))
    }
}

fn gemm<'b>(shape: Shape, a: &'b Buffer<bf16>, b: &'b Buffer<bf16>, first: usize) -> Gemm<'b> {
    let Shape { layout, n, k, .. } = shape;
    let ldb = if layout == Layout::Nt { k } else { n };
    let (a, b) = (Matrix::of(a, first * k, k), Matrix::of(b, 0, ldb));
    Gemm { shape, a, b, live: Vector::none(), dependent: false }
}

/// Measures all shapes on GPU 0 into `gemm-sharded.csv`, or says that there is none.
pub fn family(criterion: &mut Criterion) {
    const NAME: &str = "gemm_sharded";
    let Some(gpu) = open(NAME) else { return };
    let outcome = gpu.begin("gemm-sharded", HEADER).and_then(|table| {
        shapes().into_iter().try_for_each(|(shape, moves)| {
            let moving = Moving::new(&gpu, shape, moves, RANKS)?;
            gpu.clocks.restart();
            let medians = WAYS.map(|way| measure(criterion, NAME, &moving, way));
            match medians.iter().all(Option::is_some) {
                true => {
                    table.add(&moving.line(medians.map(Option::unwrap_or_default))).map_err(Error::failure)
                }
                false => Ok(()),
            }
        })
    });
    if let Err(error) = outcome {
        fail(NAME, &error);
    }
}

/// Median seconds of a way, where criterion has taken all samples.
fn measure(criterion: &mut Criterion, name: &str, moving: &Moving<'_>, way: Way) -> Option<f64> {
    let Shape { m, n, k, .. } = moving.shape;
    let samples = RefCell::new(Vec::new());
    let mut group = criterion.benchmark_group(format!("gpu_{name}"));
    group.sample_size(SAMPLES);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
    let id = BenchmarkId::new(format!("{}_{way:?}", moving.name()), format!("{m}x{n}x{k}"));
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|runs| {
            let seconds = moving
                .queue(way)
                .and_then(|()| moving.gpu.seconds(&|| (0..runs).try_for_each(|_| moving.queue(way))))
                .unwrap_or_else(|error| fail(name, &error));
            samples.borrow_mut().push(seconds / runs as f64);
            Duration::from_secs_f64(seconds)
        });
    });
    group.finish();
    let mut last = samples.into_inner();
    if last.len() < SAMPLES {
        return None;
    }
    last.drain(..last.len() - SAMPLES);
    last.sort_by(f64::total_cmp);
    Some((last[SAMPLES / 2] + last[(SAMPLES - 1) / 2]) / 2.0)
}
