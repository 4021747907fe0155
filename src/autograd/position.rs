//! Position embeddings over the tokens of a batch (NaViT, section 2.1 and Table 3).
//!
//! Tables, learned or fixed: `out[t] = Σ_j w_tj · table[i_tj]` for row and column, then combined
//! (sum, stack, product, or one table). Rule: the same weights scatter `dout` back,
//! `dtable[i] += Σ_t w_ti · dout[t]`, through the product with the other factor.
//! Fourier: `out = [sin 2πBp | cos 2πBp]`, `dB += 2π Σ_t (cos ⊙ dout_sin − sin ⊙ dout_cos) pᵀ`.

pub mod rope;

use super::device::{Launch, Matrix, Site, Step};
use super::exec::Precision;
use super::graph::{Extent, Graph, Node, Tensor};
use super::op::{Args, Io, Op, on_cpu};
use crate::cpu;
use crate::cpu::position::{Combine, Taps};
use crate::cpu::real::Real;
use crate::data::batch::PackedBatch;
use crate::data::positions;
use crate::device::Buffer;
use crate::error::Result;
use crate::kernels::position::{Backward, Banks, Forward, Places, Position};
use crate::recipe::{PositionBasis, PositionCombination, PositionConfig};

/// `[tokens, width]`. `tables` are, for the learned basis, one table (flat, joint) or the row's and
/// the column's; for Fourier the map `[width/2, 2]`; for fixed sinusoids none.
pub fn position(
    graph: &mut Graph,
    tokens: usize,
    width: usize,
    config: &PositionConfig,
    tables: Vec<Tensor>,
) -> Tensor {
    let out = graph.activation(tokens, width, Extent::Tokens);
    let inputs = tables.into_iter().map(Some).collect();
    if config.basis == PositionBasis::Fourier {
        graph.record(Fourier(config.clone()), inputs, vec![Some(out)]);
    } else {
        let fixed = match config.basis {
            PositionBasis::Sinusoidal => fixed_tables(config, width),
            _ => vec![],
        };
        graph.record(Table { config: config.clone(), fixed }, inputs, vec![Some(out)]);
    }
    out
}

fn fixed_tables(config: &PositionConfig, width: usize) -> Vec<Vec<f32>> {
    match combine(config) {
        Combine::Single => vec![positions::sinusoidal_table(config.rows * config.columns, width)],
        kind => {
            let part = if kind == Combine::Stack { width / 2 } else { width };
            vec![
                positions::sinusoidal_table(config.rows, part),
                positions::sinusoidal_table(config.columns, part),
            ]
        }
    }
}

fn combine(config: &PositionConfig) -> Combine {
    match config.combination {
        PositionCombination::Flat | PositionCombination::Joint => Combine::Single,
        PositionCombination::Sum => Combine::Sum,
        PositionCombination::Stack => Combine::Stack,
        PositionCombination::Product => Combine::Product,
    }
}

/// What every token reads of the tables.
fn taps(batch: &PackedBatch, config: &PositionConfig) -> Vec<Taps> {
    positions::taps(batch, config)
        .expect("every grid has a place: the planner bounds them, eval::forward checks them")
}

fn coordinates(batch: &PackedBatch, config: &PositionConfig) -> Vec<[f32; 2]> {
    let cu_seqlens = &batch.cu_seqlens[..=batch.images];
    positions::coordinates(&batch.positions, cu_seqlens, &batch.grids, config.coordinate)
}

/// Operands `first..` as tables, or the fixed ones in this precision.
fn tables<'a, R: Real>(args: &Args<'a, R>, first: usize, fixed: &'a [Vec<R>]) -> Vec<&'a [R]> {
    if fixed.is_empty() {
        (first..args.inputs.len()).map(|i| args.input(i)).collect()
    } else {
        fixed.iter().map(Vec::as_slice).collect()
    }
}

/// Where the tokens of a step stand on the device.
fn places<'a>(step: &'a Step<'_>, banks: &'a Banks) -> Places<'a> {
    let packed = step.packed();
    Places {
        positions: &step.batch.positions,
        grids: &step.batch.grids,
        cu_seqlens: packed.cu_seqlens,
        cu_seqlens_host: packed.cu_seqlens_host,
        banks,
    }
}

/// The embedding on a device, with the filters of its tables.
fn on_device(site: &Site<'_>, config: &PositionConfig, width: usize) -> Result<(Position, Banks)> {
    let shape = site.shape();
    let position = Position::new(config, shape.tokens, shape.slots, width)?;
    Ok((position, Banks::new(site.device(), config, shape.longest)?))
}

/// Up to two operands from `first` on.
fn device_tables(site: &Site<'_>, first: usize, count: usize) -> Result<[Option<Buffer<f32>>; 2]> {
    let [row, column] = [0, 1].map(|i| if i < count { site.input_f32(first + i) } else { Ok(None) });
    Ok([row?, column?])
}

/// The embedding, whose tables are the operands from `first` on unless they are fixed; before them stands what it
/// is added to.
fn prepare_forward(
    site: &mut Site<'_>,
    config: &PositionConfig,
    fixed: &[Vec<f32>],
    first: usize,
) -> Result<Launch> {
    let out = site.output(0)?;
    let x = if first > 0 { Some(site.input(0)?) } else { None };
    let mut tables = device_tables(site, first, site.inputs() - first)?;
    for (table, fixed) in tables.iter_mut().zip(fixed) {
        *table = Some(site.device().upload(fixed)?);
    }
    let (position, banks) = on_device(site, config, site.output_cols(0))?;
    Ok(Box::new(move |step| {
        let tables = tables.each_ref().map(Option::as_ref);
        let x = x.as_ref().map(Matrix::all);
        let operands = Forward { places: places(step, &banks), tables, x, out: out.all() };
        position.forward(step.stream, &operands)
    }))
}

/// The gradients of `count` tables, which are the operands after the gradient of the embedding.
fn prepare_backward(site: &mut Site<'_>, config: &PositionConfig, count: usize) -> Result<Launch> {
    let (dout, tables) = (site.input(0)?, device_tables(site, 1, count)?);
    let [row, column] = [0, 1].map(|i| if i < count { site.output_f32(i) } else { Ok(None) });
    let dtables = [row?, column?];
    let (position, banks) = on_device(site, config, site.input_cols(0))?;
    site.workspace(position.workspace_bytes(site.device().info()));
    Ok(Box::new(move |step| {
        let operands = Backward {
            places: places(step, &banks),
            tables: tables.each_ref().map(Option::as_ref),
            dout: dout.all(),
            dtables: dtables.each_ref().map(Option::as_ref),
            accumulate: Some(step.accumulate),
            workspace: step.workspace,
        };
        position.backward(step.stream, &operands)
    }))
}

#[derive(Clone, Debug)]
pub(super) struct Table {
    config: PositionConfig,
    fixed: Vec<Vec<f32>>,
}

impl Op for Table {
    fn name(&self) -> &'static str {
        "position"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.output_shape(0).1;
            let fixed: Vec<Vec<_>> =
                self.fixed.iter().map(|t| t.iter().map(|x| Real::of(f64::from(*x))).collect()).collect();
            let taps = taps(a.batch, &self.config);
            let taps: Vec<&Taps> = taps.iter().collect();
            let out = a.output(0);
            cpu::position::table_forward(out, &tables(&a, 0, &fixed), &taps, combine(&self.config), width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_forward(site, &self.config, &self.fixed, 0)
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        if let Some(dout) = grads[0] {
            let mut inputs = vec![Some(dout)];
            inputs.extend(&node.inputs);
            let outputs = node.inputs.iter().map(|t| t.and_then(|t| graph.gradient_of(t))).collect();
            graph.record(TableGrad(self.config.clone()), inputs, outputs);
        }
        vec![None; node.inputs.len()]
    }
}

#[derive(Debug)]
struct TableGrad(PositionConfig);

impl Op for TableGrad {
    fn name(&self) -> &'static str {
        "d position"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let taps = taps(a.batch, &self.0);
            let taps: Vec<&Taps> = taps.iter().collect();
            let mut dtables: Vec<_> = (0..a.outputs.len()).map(|i| a.output_opt(i)).collect();
            let tables = tables(&a, 1, &[]);
            let dout = a.input(0);
            cpu::position::table_backward(&mut dtables, dout, &tables, &taps, combine(&self.0), width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_backward(site, &self.0, site.inputs() - 1)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Fourier(PositionConfig);

impl Op for Fourier {
    fn name(&self) -> &'static str {
        "fourier position"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.output_shape(0).1;
            let coordinates = coordinates(a.batch, &self.0);
            cpu::position::fourier_forward(a.output(0), a.input(0), &coordinates, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_forward(site, &self.0, &[], 0)
    }

    fn backward(&self, graph: &mut Graph, node: &Node, grads: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
        if let (Some(dout), Some(dmap)) = (grads[0], graph.gradient_of(node.input(0))) {
            graph.record(FourierGrad(self.0.clone()), vec![Some(dout), node.inputs[0]], vec![Some(dmap)]);
        }
        vec![None]
    }
}

#[derive(Debug)]
struct FourierGrad(PositionConfig);

impl Op for FourierGrad {
    fn name(&self) -> &'static str {
        "d fourier position"
    }

    fn run(&self, io: Io<'_>) {
        on_cpu!(io, |a| {
            let width = a.input_shape(0).1;
            let coordinates = coordinates(a.batch, &self.0);
            cpu::position::fourier_backward(a.output(0), a.input(0), a.input(1), &coordinates, width);
        });
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        prepare_backward(site, &self.0, 1)
    }
}

/// `x + embedding` in the place of `x`.
#[derive(Debug)]
pub(super) enum AddPosition {
    /// By tables.
    Table(Table),
    /// By a Fourier map.
    Fourier(Fourier),
}

impl AddPosition {
    fn embedding(&self) -> &dyn Op {
        match self {
            Self::Table(table) => table,
            Self::Fourier(fourier) => fourier,
        }
    }

    fn added<R: Precision>(&self, mut args: Args<'_, R>) {
        let (live, width) = args.output_shape(0);
        let sum = args.output(0);
        let mut own = vec![R::ZERO; sum.len()];
        let (inputs, outputs) = (args.inputs[1..].to_vec(), vec![Some((&mut own[..], live, width))]);
        self.embedding().run(R::io(Args { inputs, outputs, batch: args.batch, step: args.step }));
        cpu::elementwise::add(sum, &own);
    }
}

impl Op for AddPosition {
    fn name(&self) -> &'static str {
        "add position"
    }

    fn in_place(&self) -> bool {
        true
    }

    fn run(&self, io: Io<'_>) {
        match io {
            Io::F32(args) => self.added(args),
            Io::F64(args) => self.added(args),
        }
    }

    fn prepare(&self, site: &mut Site<'_>) -> Result<Launch> {
        match self {
            Self::Table(table) => prepare_forward(site, &table.config, &table.fixed, 1),
            Self::Fourier(fourier) => prepare_forward(site, &fourier.0, &[], 1),
        }
    }
}
