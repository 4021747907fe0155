//! Rows of a batch in the workspace, and products of them, beside which rows come or go where ranks can overlap.

use half::bf16;

use crate::autograd::device::{Live, Matrix, Site, Step};
use crate::autograd::gemm::planned;
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::kernels::gemm::sharded::{ShardedGemm, ShardedPlan, plan};
use crate::kernels::gemm::{Epilogue, Finish, Gemm, Plan, Shape, Vector, raw};
use crate::parallel::DeviceGroup;
use crate::parallel::device::Scatter;

/// Bytes to which what shares the workspace is aligned.
const ALIGNMENT: usize = 256;

/// All rows of a batch in the workspace, and what lies behind them.
pub struct Room {
    pub rows: usize,
    pub cols: usize,
    bytes: usize,
}

impl Room {
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, bytes: (rows * cols * size_of::<bf16>()).next_multiple_of(ALIGNMENT) }
    }

    /// Makes the workspace large enough for the rows and for what the launches beside them have asked for so far.
    pub fn reserve(&self, site: &mut Site<'_>, products: usize) {
        site.workspace(self.bytes + products);
    }

    pub fn buffer(&self, step: &Step<'_>) -> Result<Buffer<bf16>> {
        step.workspace.view(0..self.rows * self.cols * size_of::<bf16>())
    }

    pub fn rest(&self, step: &Step<'_>) -> Result<Buffer<u8>> {
        step.workspace.view(self.bytes..step.workspace.len())
    }

    pub fn matrix(&self, buffer: Buffer<bf16>) -> Matrix {
        Matrix { buffer, rows: self.rows, cols: self.cols, live: Live::Tokens }
    }

    /// The rows of all ranks, once they have come.
    pub fn gather(&self, step: &Step<'_>, own: &Matrix) -> Result<Matrix> {
        let all = self.buffer(step)?;
        group(step)?.all_gather(step.stream, &all, &own.buffer)?;
        Ok(self.matrix(all))
    }

    /// The rows of all ranks, and the first product with them.
    pub fn gather_into(
        &self,
        step: &Step<'_>,
        own: &Matrix,
        first: (&Product, &Matrix, &Epilogue<'_>),
    ) -> Result<Matrix> {
        let ((product, weight, end), rest) = (first, self.rest(step)?);
        let (Some(plan), Some(ring)) = (&product.in_chunks, step.ring) else {
            let all = self.gather(step, own)?;
            product.launch(step, [&all, weight], end, &rest)?;
            return Ok(all);
        };
        let all = self.matrix(self.buffer(step)?);
        ring.gather(group(step)?, step.stream, &all.buffer, &own.buffer, |ready| {
            let gemm = product.gemm(step, [&all, weight]);
            let chunks = ring.gathered();
            ShardedGemm { gemm, chunks, ready: Some(ready), done: None }.launch(step.stream, end, plan)
        })?;
        Ok(all)
    }

    /// The last product that is added to the summands, and this rank's rows of their sum over the ranks.
    pub fn reduce_from(
        &self,
        step: &Step<'_>,
        own: &Matrix,
        last: (&Product, [&Matrix; 2], &Epilogue<'_>),
    ) -> Result<()> {
        let ((product, operands, end), rest) = (last, self.rest(step)?);
        let summands = self.buffer(step)?;
        let (Some(plan), Some(ring)) = (&product.in_chunks, step.ring) else {
            product.launch(step, operands, end, &rest)?;
            return group(step)?.reduce_scatter(step.stream, &own.buffer, &summands);
        };
        let chunks = ring.scattered();
        let scatter = Scatter {
            summands: &summands,
            arriving: &rest.view(0..own.buffer.len() * size_of::<bf16>())?,
            out: &own.buffer,
            width: self.cols,
            writers: plan.writers(chunks, product.shape.n),
        };
        ring.scatter(group(step)?, step.stream, &scatter, |done| {
            let gemm = product.gemm(step, operands);
            ShardedGemm { gemm, chunks, ready: None, done: Some(done) }.launch(step.stream, end, plan)
        })
    }
}

pub fn group<'a>(step: &Step<'a>) -> Result<&'a DeviceGroup> {
    step.tensor
        .ok_or_else(|| Error::failure("the layers are shared out, and there are no ranks to share them"))
}

/// A product of the rows of a batch, with its plan and what it needs of the workspace.
pub struct Product {
    pub shape: Shape,
    plan: Plan,
    /// The same while rows come or go.
    in_chunks: Option<ShardedPlan>,
    pub bytes: usize,
}

impl Product {
    pub fn new(site: &mut Site<'_>, shape: Shape, finish: Finish) -> Result<Self> {
        let plan = planned(site, shape, finish, false)?;
        let bytes = raw::workspace_bytes(&plan, finish.kind, shape.m, shape.n, false);
        Ok(Self { shape, plan, in_chunks: None, bytes })
    }

    /// The same for rows that may come, or go, while it runs.
    pub fn moving(site: &mut Site<'_>, shape: Shape, finish: Finish, scattered: bool) -> Result<Self> {
        let mut product = Self::new(site, shape, finish)?;
        if let Some(ring) = site.ring() {
            let chunks = if scattered { ring.scattered() } else { ring.gathered() };
            product.in_chunks = plan(shape, chunks, finish, site.device().info(), ring.reserved());
        }
        Ok(product)
    }

    pub fn gemm<'a>(&self, step: &'a Step<'_>, [a, b]: [&'a Matrix; 2]) -> Gemm<'a> {
        let (a_rows, b_rows, live) = (a.operand(), b.operand(), step.live_rows(a));
        Gemm { shape: self.shape, a: a_rows, b: b_rows, live, dependent: false }
    }

    pub fn launch(
        &self,
        step: &Step<'_>,
        operands: [&Matrix; 2],
        end: &Epilogue<'_>,
        workspace: &Buffer<u8>,
    ) -> Result<()> {
        self.gemm(step, operands).launch(step.stream, end, &self.plan, &Vector::from(workspace))
    }
}
