//! Position embeddings: basis × coordinate × combination (NaViT Table 3).

use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::autograd::position;
use crate::error::{Error, Result};
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, PositionBasis, PositionCombination, PositionConfig, PositionCoordinate};

/// `[T, D]`, or `None` where the model has no position embedding. Parameters: `position.table`
/// (flat, joint), `position.row` and `position.column` (sum, stack, product), `position.map`
/// (Fourier); fixed sinusoids have none.
pub fn position_embedding(
    graph: &mut Graph,
    tokens: usize,
    config: &ModelConfig,
    dims: &Dimensions,
) -> Option<Tensor> {
    let position = &config.position;
    let mut table = |part: &str, rows: usize, cols: usize, std: f64| {
        graph.param(ParamSpec {
            name: format!("position.{part}"),
            shape: vec![rows, cols],
            init: Init::Normal(std as f32),
            decay: false,
            head: false,
        })
    };
    let width = dims.width;
    let tables = match position.basis {
        PositionBasis::None => return None,
        PositionBasis::Sinusoidal => vec![],
        PositionBasis::Fourier => {
            // Absolute coordinates run to the table's length, fractional ones to 1: the same map
            // in both, or neighbouring patches would start uncorrelated.
            let reach = match position.coordinate {
                PositionCoordinate::Absolute => position.rows.max(position.columns).max(1),
                PositionCoordinate::Fractional | PositionCoordinate::FractionalAspect => 1,
            };
            vec![table("map", width / 2, 2, position.fourier_std / reach as f64)]
        }
        PositionBasis::Learned => match position.combination {
            PositionCombination::Flat | PositionCombination::Joint => {
                vec![table("table", position.rows * position.columns, width, 0.02)]
            }
            combination => {
                // A product of two small numbers would start as almost nothing.
                let std = if combination == PositionCombination::Product { 0.14 } else { 0.02 };
                let part = if combination == PositionCombination::Stack { width / 2 } else { width };
                vec![table("row", position.rows, part, std), table("column", position.columns, part, std)]
            }
        },
    };
    Some(position::position(graph, tokens, width, position, tables))
}

/// Checks that a patch grid has a place in the model's position tables; only tables over absolute
/// coordinates have an end.
///
/// # Errors
/// Names the grid, the table and the recipe key.
pub fn check_grid(config: &PositionConfig, grid: [u16; 2]) -> Result<()> {
    let [rows, columns] = grid.map(usize::from);
    let tables = matches!(config.basis, PositionBasis::Learned | PositionBasis::Sinusoidal);
    if !tables || config.coordinate != PositionCoordinate::Absolute {
        return Ok(());
    }
    let fits = if config.combination == PositionCombination::Flat {
        rows * columns <= config.rows * config.columns
    } else {
        rows <= config.rows && columns <= config.columns
    };
    if fits {
        return Ok(());
    }
    Err(Error::usage(format!(
        "a patch grid of {rows}x{columns} does not fit the position table of {}x{}; lower the resolution or raise \
         model.position.rows and model.position.columns",
        config.rows, config.columns
    )))
}
