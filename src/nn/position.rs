//! Position embeddings: basis × coordinate × combination (NaViT Table 3).

use crate::autograd::graph::{Graph, Init, ParamSpec, Tensor};
use crate::autograd::position;
use crate::recipe::shapes::Dimensions;
use crate::recipe::{ModelConfig, PositionBasis, PositionCombination, PositionCoordinate};

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
