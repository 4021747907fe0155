//! Position embeddings over the tokens of a batch.
use super::graph::{Graph, Tensor};
use crate::models::recipe::PositionConfig;
/// wip
pub fn position(
    _graph: &mut Graph,
    _tokens: usize,
    _width: usize,
    _config: &PositionConfig,
    _tables: Vec<Tensor>,
) -> Tensor {
    unimplemented!()
}
