//! The same on a device: what is gathered, and what is to be reduced, lies in the workspace of the launch.
//!
//! A rank's part of a batch are consecutive rows, so a gather puts parts one after another, and a reduce-scatter takes
//! them so. Rows that are not live are zeros: products write them, and ranks send them like others.
//!
//! Where the ranks can, they overlap ([`DeviceRing`](crate::parallel::device::DeviceRing)): the first product after a
//! gather begins with the rows that have come, and the last before a reduction sends rows as it writes them. The product through GELU's slope has no kernel
//! for that, so the gather before it is waited for.

mod room;

use half::bf16;

use crate::autograd::device::{Launch, Matrix, Site, Step};
use crate::autograd::split::Shard;
use crate::device::Buffer;
use crate::error::Result;
use crate::kernels::gemm::{
    BiasGrad, Epilogue, Finish, GeluGrad, Layout, Matrix as Operand, Shape, Store, Sum, Vector, raw,
};
use crate::recipe::GeluKind;
use room::{Product, Room, group};

/// The column sums of `dy`, added to `db`.
fn add_column_sums(step: &Step<'_>, db: &Buffer<f32>, dy: &Matrix, workspace: &Buffer<u8>) -> Result<()> {
    let sums = BiasGrad {
        dy: dy.operand(),
        m: dy.rows,
        n: dy.cols,
        live: step.live_rows(dy),
        out: Vector::from(db),
        accumulate: Vector::from(step.accumulate),
    };
    sums.launch(step.stream, &Vector::from(workspace))
}

/// `dw += dyᵀ x`.
fn add_weight_grad(
    step: &Step<'_>,
    product: &Product,
    dw: &Buffer<f32>,
    operands: [&Matrix; 2],
    workspace: &Buffer<u8>,
) -> Result<()> {
    let out = Operand::of(dw, 0, product.shape.n);
    let sum = Epilogue::Sum(Sum { out, accumulate: Vector::from(step.accumulate), squares: Vector::none() });
    product.launch(step, operands, &sum, workspace)
}

pub(super) fn row_linear(gelu: &[Option<GeluKind>], site: &mut Site<'_>) -> Result<Launch> {
    struct Part {
        weight: Matrix,
        bias: Option<Buffer<f32>>,
        gelu: Option<GeluKind>,
        y: Matrix,
        pre: Option<Matrix>,
        product: Product,
    }
    impl Part {
        fn end(&self) -> Epilogue<'_> {
            let mut store = Store::plain(self.y.operand());
            store.bias = self.bias.as_ref().map_or(Vector::none(), Vector::from);
            store.gelu = self.gelu;
            store.pre = self.pre.as_ref().map_or(Operand::none(), Matrix::operand);
            Epilogue::Store(store)
        }
    }
    let x = site.input(0)?;
    let room = Room::new(x.rows * site.shard().size, x.cols);
    let mut parts = Vec::new();
    for (i, &gelu) in gelu.iter().enumerate() {
        let (weight, bias) = (site.input(1 + 2 * i)?, site.input_f32(2 + 2 * i)?);
        let (y, pre) = (site.output(2 * i)?, site.output_opt(2 * i + 1)?);
        let shape = Shape { layout: Layout::Nt, m: room.rows, n: weight.rows, k: x.cols };
        let finish = Finish::store(gelu.is_some(), pre.is_some(), false);
        let product = match i {
            0 => Product::moving(site, shape, finish, false)?,
            _ => Product::new(site, shape, finish)?,
        };
        parts.push(Part { weight, bias, gelu, y, pre, product });
    }
    room.reserve(site, parts.iter().map(|part| part.product.bytes).max().unwrap_or(0));
    Ok(Box::new(move |step| {
        let Some((first, others)) = parts.split_first() else { return Ok(()) };
        let all = room.gather_into(step, &x, (&first.product, &first.weight, &first.end()))?;
        let rest = room.rest(step)?;
        others.iter().try_for_each(|part| part.product.launch(step, [&all, &part.weight], &part.end(), &rest))
    }))
}

pub(super) fn row_linear_grad(site: &mut Site<'_>) -> Result<Launch> {
    struct Part {
        dy: Matrix,
        weight: Matrix,
        dw: Buffer<f32>,
        db: Option<Buffer<f32>>,
        input: Product,
        outer: Product,
    }
    let (x, dx) = (site.input(0)?, site.output(0)?);
    let room = Room::new(x.rows * site.shard().size, x.cols);
    let (mut parts, mut bytes) = (Vec::new(), 0);
    let count = site.inputs() / 2;
    for i in 0..count {
        let (dy, weight) = (site.input(1 + 2 * i)?, site.input(2 + 2 * i)?);
        let dw = site.output_f32(1 + 2 * i)?;
        let (dw, db) = (site.present(dw)?, site.output_f32(2 + 2 * i)?);
        let shape = Shape { layout: Layout::Nn, m: room.rows, n: x.cols, k: dy.cols };
        let finish = Finish::store(false, false, i > 0);
        let input = if i + 1 == count {
            Product::moving(site, shape, finish, true)?
        } else {
            Product::new(site, shape, finish)?
        };
        let shape = Shape { layout: Layout::Tn, m: dy.cols, n: x.cols, k: room.rows };
        let outer = Product::new(site, shape, Finish::sum())?;
        bytes = bytes.max(input.bytes).max(outer.bytes);
        if db.is_some() {
            bytes = bytes.max(raw::bias_grad_workspace_bytes(dy.rows, dy.cols));
        }
        parts.push(Part { dy, weight, dw, db, input, outer });
    }
    room.reserve(site, bytes.max(dx.buffer.len() * size_of::<bf16>()));
    Ok(Box::new(move |step| {
        // First the gradient of x, whose memory the gathered x then takes.
        let (summand, rest) = (room.matrix(room.buffer(step)?), room.rest(step)?);
        for (i, part) in parts.iter().enumerate() {
            let mut store = Store::plain(summand.operand());
            if i > 0 {
                store.residual = summand.operand();
            }
            let (operands, end) = ([&part.dy, &part.weight], Epilogue::Store(store));
            match i + 1 == parts.len() {
                true => room.reduce_from(step, &dx, (&part.input, operands, &end))?,
                false => part.input.launch(step, operands, &end, &rest)?,
            }
        }
        let all = room.gather(step, &x)?;
        parts.iter().try_for_each(|part| {
            add_weight_grad(step, &part.outer, &part.dw, [&part.dy, &all], &rest)?;
            part.db.as_ref().map_or(Ok(()), |db| add_column_sums(step, db, &part.dy, &rest))
        })
    }))
}

pub(super) fn column_linear(site: &mut Site<'_>) -> Result<Launch> {
    struct Part {
        x: Matrix,
        weight: Matrix,
        bias: Option<Buffer<f32>>,
        product: Product,
    }
    let (y, shard) = (site.output(0)?, site.shard());
    let room = Room::new(y.rows * shard.size, y.cols);
    let mut parts = Vec::new();
    let count = site.inputs() / 3;
    for i in 0..count {
        let (x, weight, bias) = (site.input(3 * i)?, site.input(3 * i + 1)?, site.input_f32(3 * i + 2)?);
        let shape = Shape { layout: Layout::Nt, m: room.rows, n: weight.rows, k: x.cols };
        let finish = Finish::store(false, false, i > 0);
        let product = if i + 1 == count {
            Product::moving(site, shape, finish, true)?
        } else {
            Product::new(site, shape, finish)?
        };
        // Of the ranks that all have it, one adds it.
        parts.push(Part { x, weight, bias: bias.filter(|_| shard.rank == 0), product });
    }
    let products = parts.iter().map(|part| part.product.bytes).max().unwrap_or(0);
    room.reserve(site, products.max(y.buffer.len() * size_of::<bf16>()));
    Ok(Box::new(move |step| {
        let (summand, rest) = (room.matrix(room.buffer(step)?), room.rest(step)?);
        for (i, part) in parts.iter().enumerate() {
            let mut store = Store::plain(summand.operand());
            store.bias = part.bias.as_ref().map_or(Vector::none(), Vector::from);
            if i > 0 {
                store.residual = summand.operand();
            }
            let (operands, end) = ([&part.x, &part.weight], Epilogue::Store(store));
            match i + 1 == parts.len() {
                true => room.reduce_from(step, &y, (&part.product, operands, &end))?,
                false => part.product.launch(step, operands, &end, &rest)?,
            }
        }
        Ok(())
    }))
}

pub(super) fn column_linear_grad(gelu: &[Option<GeluKind>], site: &mut Site<'_>) -> Result<Launch> {
    struct Part {
        x: Matrix,
        weight: Matrix,
        /// What GELU was taken of.
        pre: Option<(GeluKind, Matrix)>,
        dx: Matrix,
        dw: Buffer<f32>,
        db: Option<Buffer<f32>>,
        input: Product,
        outer: Product,
    }
    impl Part {
        fn end<'a>(&'a self, step: &'a Step<'_>) -> Epilogue<'a> {
            match &self.pre {
                Some((kind, pre)) => Epilogue::GeluGrad(GeluGrad {
                    out: self.dx.operand(),
                    pre: pre.operand(),
                    gelu: *kind,
                    bias_grad: Vector::none(),
                    accumulate: Vector::from(step.accumulate),
                }),
                None => Epilogue::Store(Store::plain(self.dx.operand())),
            }
        }
    }
    let dy = site.input(0)?;
    let room = Room::new(dy.rows * site.shard().size, dy.cols);
    let (mut parts, mut bytes) = (Vec::new(), 0);
    for (i, gelu) in gelu.iter().enumerate() {
        let (x, weight) = (site.input(1 + 3 * i)?, site.input(2 + 3 * i)?);
        let pre = match gelu {
            Some(kind) => Some((*kind, site.input(3 + 3 * i)?)),
            None => None,
        };
        let (dx, dw) = (site.output(3 * i)?, site.output_f32(3 * i + 1)?);
        let (dw, db) = (site.present(dw)?, site.output_f32(3 * i + 2)?);
        let shape = Shape { layout: Layout::Nn, m: room.rows, n: weight.cols, k: dy.cols };
        let input = match &pre {
            Some(_) => Product::new(site, shape, Finish::gelu_grad())?,
            None if i == 0 => Product::moving(site, shape, Finish::store(false, false, false), false)?,
            None => Product::new(site, shape, Finish::store(false, false, false))?,
        };
        let shape = Shape { layout: Layout::Tn, m: dy.cols, n: x.cols, k: room.rows };
        let outer = Product::new(site, shape, Finish::sum())?;
        bytes = bytes.max(input.bytes).max(outer.bytes);
        if db.is_some() {
            bytes = bytes.max(raw::bias_grad_workspace_bytes(room.rows, dy.cols));
        }
        parts.push(Part { x, weight, pre, dx, dw, db, input, outer });
    }
    room.reserve(site, bytes);
    Ok(Box::new(move |step| {
        let Some((first, others)) = parts.split_first() else { return Ok(()) };
        let all = room.gather_into(step, &dy, (&first.input, &first.weight, &first.end(step)))?;
        let rest = room.rest(step)?;
        for part in others {
            part.input.launch(step, [&all, &part.weight], &part.end(step), &rest)?;
        }
        parts.iter().try_for_each(|part| {
            add_weight_grad(step, &part.outer, &part.dw, [&all, &part.x], &rest)?;
            part.db.as_ref().map_or(Ok(()), |db| add_column_sums(step, db, &all, &rest))
        })
    }))
}

pub(super) fn own_rows(shard: Shard, site: &mut Site<'_>) -> Result<Launch> {
    let (x, out) = (site.input(0)?, site.output(0)?);
    let bytes = out.buffer.len() * size_of::<bf16>();
    let own = x.buffer.view::<bf16>(shard.rank * bytes..(shard.rank + 1) * bytes)?;
    Ok(Box::new(move |step| out.buffer.copy_from(step.stream, &own)))
}

pub(super) fn all_rows(site: &mut Site<'_>) -> Result<Launch> {
    let (x, out) = (site.input(0)?, site.output(0)?);
    Ok(Box::new(move |step| group(step)?.all_gather(step.stream, &out.buffer, &x.buffer)))
}
