//! A product in chunks that are copied to where it reads them, and from where it writes them, on other streams.

use half::bf16;

use trencadis::device::{Buffer, Device, Event, Stream};
use trencadis::kernels::gemm::sharded::{Chunks, Done, Ready, ShardedGemm, ShardedPlan};
use trencadis::kernels::gemm::{Epilogue, Gemm, Kind, Matrix, Plan, Shape, Store, Sum, Vector};
use trencadis::recipe::GeluKind;
use trencadis::{Error, Result};

use super::poison;
use crate::product::{FOREIGN, Product, stored};
use crate::support::numbers::random;

/// What is copied beside the launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moved {
    /// Rows of the first operand.
    In,
    /// Rows of the result.
    Out,
    /// Both.
    Both,
}

/// What somebody does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    Nothing,
    /// The launch does not wait for its rows.
    NoWait,
    /// Flags are raised before the rows are copied.
    FlagFirst,
    /// Nobody raises the flag of the last chunk.
    NeverRaised,
    /// A chunk is taken when all but one of the warps have counted.
    TakenEarly,
}

/// A product, its chunks, and how they move.
pub struct Case<'a> {
    pub product: &'a Product,
    pub chunks: &'a Chunks,
    pub kind: Kind,
    pub plan: ShardedPlan,
    /// Whether there is no bias, and no GELU.
    pub plain: bool,
    pub moved: Moved,
    /// Chunks in the order in which they are brought.
    pub brought: Vec<usize>,
    /// Streams that bring them, by turns.
    pub streams: usize,
    /// Whether each chunk is brought by the stream that takes the one before, after that.
    pub one_by_one: bool,
    pub launches: usize,
    /// Whether the launches are replays of a graph.
    pub captured: bool,
    pub fault: Fault,
}

impl std::fmt::Debug for Case<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { chunks, kind, plan, brought, streams, launches, captured, .. } = self;
        let shape = self.product.shape;
        write!(
            f,
            "{shape:?} live {:?} {chunks:?} {kind:?} {plan:?} brought {brought:?} by {streams} streams, {launches} \
             launches, captured {captured}",
            self.product.live
        )
    }
}

/// Results, rows of the batch without what lies between them.
pub enum Results {
    /// With what lies before GELU.
    Stored(Vec<bf16>, Vec<bf16>),
    Summed(Vec<f32>),
}

pub fn bits(results: &Results) -> Vec<u32> {
    match results {
        Results::Stored(out, pre) => out.iter().chain(pre).map(|x| u32::from(x.to_bits())).collect(),
        Results::Summed(out) => out.iter().map(|x| x.to_bits()).collect(),
    }
}

/// Memory of results.
struct Room {
    out: Buffer<bf16>,
    pre: Buffer<bf16>,
    sum: Buffer<f32>,
    bias: Buffer<f32>,
}

impl Room {
    fn new(device: &Device, shape: Shape) -> Self {
        let len = shape.m * shape.n;
        Self {
            out: device.upload(&poison(len)).unwrap(),
            pre: device.upload(&poison(len)).unwrap(),
            sum: device.upload(&vec![f32::NAN; len]).unwrap(),
            bias: device.upload(&random::<f32>(shape.n, 3)).unwrap(),
        }
    }

    /// From a row on.
    fn epilogue(&self, case: &Case<'_>, row: usize) -> Epilogue<'_> {
        let n = case.product.shape.n;
        if case.kind == Kind::Sum {
            let out = Matrix::of(&self.sum, row * n, n);
            return Epilogue::Sum(Sum { out, accumulate: Vector::none(), squares: Vector::none() });
        }
        let plain = Store::plain(Matrix::of(&self.out, row * n, n));
        if case.plain {
            return Epilogue::Store(plain);
        }
        Epilogue::Store(Store {
            bias: Vector::from(&self.bias),
            gelu: Some(GeluKind::Erf),
            pre: Matrix::of(&self.pre, row * n, n),
            ..plain
        })
    }

    fn results(&self, case: &Case<'_>) -> Result<Results> {
        Ok(match case.kind {
            Kind::Sum => Results::Summed(self.sum.download()?),
            _ if case.plain => Results::Stored(self.out.download()?, Vec::new()),
            _ => Results::Stored(self.out.download()?, self.pre.download()?),
        })
    }
}

impl<'a> Case<'a> {
    /// Brought and taken by one stream, in the order of the chunks.
    pub fn new(product: &'a Product, chunks: &'a Chunks, kind: Kind, plan: ShardedPlan) -> Self {
        Self {
            product,
            chunks,
            kind,
            plan,
            plain: true,
            moved: Moved::Both,
            brought: chunks.order().to_vec(),
            streams: 1,
            one_by_one: false,
            launches: 1,
            captured: false,
            fault: Fault::Nothing,
        }
    }

    /// Elements between rows of the first operand.
    fn stride(&self) -> usize {
        stored(self.product.shape)[0][1] + FOREIGN
    }

    fn gemm<'b>(&self, a: Matrix<'b, bf16>, b: &'b Buffer<bf16>, live: &'b Option<Buffer<i32>>) -> Gemm<'b> {
        let b = Matrix::of(b, 0, stored(self.product.shape)[1][1] + FOREIGN);
        let live = live.as_ref().map_or(Vector::none(), Vector::from);
        Gemm { shape: self.product.shape, a, b, live, dependent: false }
    }

    /// The plan of the model.
    pub fn planned(&self, device: &Device, reserve: u32) -> ShardedPlan {
        let operands = self.product.upload(device);
        let room = Room::new(device, self.product.shape);
        let gemm = self.gemm(Matrix::of(&operands.a, 0, self.stride()), &operands.b, &operands.live);
        let sharded = ShardedGemm { gemm, chunks: self.chunks, ready: None, done: None };
        sharded.plan(&room.epilogue(self, 0), device.info(), reserve).unwrap()
    }

    /// Launches it while its chunks move; what is written in the end.
    pub fn run(&self, device: &Device) -> Result<Results> {
        self.launch(device).map(|(results, _)| results)
    }

    /// Milliseconds from the begin of everything to the begin and the end of what is copied, and of the launch.
    pub fn intervals(&self, device: &Device) -> Result<[[f32; 2]; 2]> {
        self.launch(device).map(|(_, intervals)| intervals)
    }

    fn launch(&self, device: &Device) -> Result<(Results, [[f32; 2]; 2])> {
        let shape = self.product.shape;
        let operands = self.product.upload(device);
        let nowhere = device.upload(&poison(self.product.a.len()))?;
        let gathered = device.alloc::<bf16>(self.product.a.len())?;
        let (room, taken) = (Room::new(device, shape), Room::new(device, shape));
        let (ready, done) = (Ready::new(device, self.chunks.len())?, Done::new(device, self.chunks.len())?);
        let (comes, goes) = (self.moved != Moved::Out, self.moved != Moved::In);
        let a = if comes { &gathered } else { &operands.a };
        let sharded = ShardedGemm {
            gemm: self.gemm(Matrix::of(a, 0, self.stride()), &operands.b, &operands.live),
            chunks: self.chunks,
            ready: (comes && self.fault != Fault::NoWait).then_some(&ready),
            done: goes.then_some(&done),
        };
        let epilogue = room.epilogue(self, 0);
        let early = u32::from(self.fault == Fault::TakenEarly);
        let writers = self.plan.writers(self.chunks, shape.n) - early;

        let stream = device.stream()?;
        let bringing = (0..self.streams).map(|_| device.stream()).collect::<Result<Vec<_>>>()?;
        let taking = device.stream()?;
        let others = || bringing.iter().chain([&taking]);
        // Queues all of it; the events are those of `intervals`, after that of the begin.
        let queue = || -> Result<[Event; 5]> {
            gathered.copy_from(&stream, &nowhere)?;
            let begin = stream.record()?;
            others().try_for_each(|other| other.wait(&begin))?;
            let copies = if comes { &bringing[0] } else { &taking };
            let first = copies.record()?;
            for (i, &chunk) in self.brought.iter().enumerate().filter(|_| comes) {
                let by = if self.one_by_one { &taking } else { &bringing[i % self.streams] };
                self.bring(by, chunk, &gathered, &operands.a, &ready)?;
                if self.one_by_one {
                    done.take(by, chunk, writers)?;
                    self.take(by, chunk, &room, &taken)?;
                }
            }
            for &chunk in self.chunks.order().iter().filter(|_| goes && !self.one_by_one) {
                done.take(&taking, chunk, writers)?;
                self.take(&taking, chunk, &room, &taken)?;
            }
            let last = copies.record()?;
            let start = stream.record()?;
            sharded.launch(&stream, &epilogue, &self.plan)?;
            let end = stream.record()?;
            others().try_for_each(|other| stream.wait(&other.record()?))?;
            Ok([begin, first, last, start, end])
        };
        let mut intervals = [[0.0; 2]; 2];
        if self.captured {
            stream.begin_capture()?;
            queue()?;
            let graph = stream.end_capture()?;
            (0..self.launches).try_for_each(|_| graph.launch(&stream))?;
            stream.synchronize()?;
        }
        for _ in (0..self.launches).filter(|_| !self.captured) {
            let [begin, first, last, start, end] = queue()?;
            stream.synchronize()?;
            let at = |event: &Event| begin.elapsed_ms(event);
            intervals = [[at(&first)?, at(&last)?], [at(&start)?, at(&end)?]];
        }
        let results = room.results(self)?;
        if goes && bits(&taken.results(self)?) != bits(&results) {
            return Err(Error::failure(format!("{self:?}: what was taken is not what was written")));
        }
        Ok((results, intervals))
    }

    fn bring(
        &self,
        stream: &Stream,
        chunk: usize,
        to: &Buffer<bf16>,
        from: &Buffer<bf16>,
        ready: &Ready,
    ) -> Result<()> {
        if self.fault == Fault::NeverRaised && chunk == self.chunks.len() - 1 {
            return Ok(());
        }
        let bytes = self.chunks.rows() * self.stride() * 2;
        let rows = chunk * bytes..(chunk + 1) * bytes;
        if self.fault == Fault::FlagFirst {
            ready.raise(stream, chunk)?;
        }
        to.view::<bf16>(rows.clone())?.copy_from(stream, &from.view(rows)?)?;
        if self.fault != Fault::FlagFirst {
            ready.raise(stream, chunk)?;
        }
        Ok(())
    }

    /// Copies the rows of a chunk of all results.
    fn take(&self, stream: &Stream, chunk: usize, from: &Room, to: &Room) -> Result<()> {
        let len = self.chunks.rows() * self.product.shape.n;
        let rows = |bytes: usize| chunk * len * bytes..(chunk + 1) * len * bytes;
        to.out.view::<bf16>(rows(2))?.copy_from(stream, &from.out.view(rows(2))?)?;
        to.pre.view::<bf16>(rows(2))?.copy_from(stream, &from.pre.view(rows(2))?)?;
        to.sum.view::<f32>(rows(4))?.copy_from(stream, &from.sum.view(rows(4))?)
    }

    /// The same by a launch for each chunk, of the same tile.
    pub fn chunk_by_chunk(&self, device: &Device) -> Results {
        let shape = self.product.shape;
        let operands = self.product.upload(device);
        let room = Room::new(device, shape);
        let stream = device.stream().unwrap();
        let rows = self.chunks.rows();
        let tile = self.plan.tile;
        let clusters = u32::from(tile.hopper.is_some());
        let plan = Plan { tile, stages: self.plan.stages, splits: 1, group: self.plan.group, clusters };
        for chunk in 0..self.chunks.len() {
            let live = self.product.live.unwrap_or(shape.m).saturating_sub(chunk * rows).min(rows);
            let live = Some(device.upload(&[live as i32]).unwrap());
            let a = Matrix::of(&operands.a, chunk * rows * self.stride(), self.stride());
            let gemm = Gemm { shape: Shape { m: rows, ..shape }, ..self.gemm(a, &operands.b, &live) };
            let epilogue = room.epilogue(self, chunk * rows);
            gemm.launch(&stream, &epilogue, &plan, &Vector::none()).unwrap();
            stream.synchronize().unwrap();
        }
        room.results(self).unwrap()
    }
}
