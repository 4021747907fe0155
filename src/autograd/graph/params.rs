//! What a parameter is.

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All elements are this value.
    Constant(f32),
    /// Normal with this standard deviation, cut at two of them.
    TruncatedNormal(f32),
    /// Normal with this standard deviation.
    Normal(f32),
}

/// Name, shape and treatment of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Dotted name as it stands in checkpoints, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// Shape as it stands in checkpoints.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay applies (matrices, not gains, biases, positions or tokens).
    pub decay: bool,
    /// Whether it belongs to the classification head (own weight decay; replaced by `--init`).
    pub head: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
