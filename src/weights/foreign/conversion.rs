//! Moving tensors from one set of names to another, with every mistake named.

use std::collections::BTreeMap;

use super::Weights;
use crate::recipe::shapes::SHAPES;
use crate::recipe::{ModelConfig, QkNormKind};
use crate::{Error, Result};

/// Shape and row-major values.
pub(super) type Tensor = (Vec<usize>, Vec<f32>);

/// Tensors that are still to be converted, and those that are.
pub(super) struct Conversion {
    family: &'static str,
    from: BTreeMap<String, Tensor>,
    to: Weights,
}

impl Conversion {
    pub(super) fn new(family: &'static str, weights: Weights) -> Self {
        let to = Weights { tensors: BTreeMap::new(), metadata: weights.metadata };
        Self { family, from: weights.tensors, to }
    }

    /// An error about these weights.
    pub(super) fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::usage(format!("weights of {}: {message}", self.family))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.from.contains_key(name)
    }

    /// Names that are still to be converted.
    pub(super) fn names(&self) -> Vec<String> {
        self.from.keys().cloned().collect()
    }

    /// Shape of a tensor that is still to be converted, with as many dimensions as the pattern asks for.
    pub(super) fn shape<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let (shape, _) = self.from.get(name).ok_or_else(|| self.error(format_args!("{name} is missing")))?;
        shape
            .as_slice()
            .try_into()
            .map_err(|_| self.error(format_args!("{name} has shape {shape:?}, expected {N} dimensions")))
    }

    pub(super) fn take(&mut self, name: &str) -> Result<Tensor> {
        self.from.remove(name).ok_or_else(|| self.error(format_args!("{name} is missing")))
    }

    /// Takes a tensor of exactly this number of elements.
    pub(super) fn take_len(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let (shape, values) = self.take(name)?;
        if values.len() != len {
            return Err(self.error(format_args!("{name} has shape {shape:?}, expected {len} elements")));
        }
        Ok(values)
    }

    pub(super) fn put(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        self.to.tensors.insert(name.into(), (shape.to_vec(), values));
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let tensor = self.take(from)?;
        self.to.tensors.insert(to.into(), tensor);
        Ok(())
    }

    /// `from.weight` and, where it exists, `from.bias`.
    pub(super) fn linear(&mut self, from: &str, to: &str) -> Result<()> {
        self.rename(&format!("{from}.weight"), &format!("{to}.weight"))?;
        self.optional(&format!("{from}.bias"), &format!("{to}.bias"))
    }

    /// As [`Conversion::linear`], the weight becoming a gain.
    pub(super) fn norm(&mut self, from: &str, to: &str) -> Result<()> {
        self.rename(&format!("{from}.weight"), &format!("{to}.gain"))?;
        self.optional(&format!("{from}.bias"), &format!("{to}.bias"))
    }

    /// [`Conversion::norm`] if the module exists; whether it does.
    pub(super) fn optional_norm(&mut self, from: &str, to: &str) -> Result<bool> {
        let exists = self.has(&format!("{from}.weight"));
        if exists {
            self.norm(from, to)?;
        }
        Ok(exists)
    }

    pub(super) fn optional(&mut self, from: &str, to: &str) -> Result<()> {
        if self.has(from) { self.rename(from, to) } else { Ok(()) }
    }

    /// Joins row blocks `parts` (weights, or biases as rows of one element) of one width into `to`.
    pub(super) fn stack_rows(&mut self, parts: &[String], to: &str) -> Result<()> {
        let mut values = Vec::new();
        let (mut rows, mut tail) = (0, None);
        for part in parts {
            let (shape, part_values) = self.take(part)?;
            let (first, rest) =
                shape.split_first().ok_or_else(|| self.error(format_args!("{part} is a scalar")))?;
            if tail.get_or_insert_with(|| rest.to_vec()) != rest {
                return Err(self.error(format_args!("{part} has shape {shape:?}, unlike its siblings")));
            }
            rows += first;
            values.extend(part_values);
        }
        let mut shape = vec![rows];
        shape.extend(tail.unwrap_or_default());
        self.put(to, &shape, values);
        Ok(())
    }

    /// Separate `q`, `k`, `v` (or `q` and a fused `kv`) modules as one, biases included.
    pub(super) fn join_linear(&mut self, parts: &[String], to: &str) -> Result<()> {
        for kind in ["weight", "bias"] {
            let names: Vec<_> = parts.iter().map(|part| format!("{part}.{kind}")).collect();
            if kind == "weight" || self.has(&names[0]) {
                self.stack_rows(&names, &format!("{to}.{kind}"))?;
            }
        }
        Ok(())
    }

    /// Checks that nothing is left over, gives a network without a classifier the identity as one, reads the sizes and switches that the shapes determine into
    /// `model`, and gives zeros to biases that only some modules of a kind have.
    pub(super) fn finish(mut self, model: &mut ModelConfig) -> Result<Weights> {
        if let Some(name) = self.from.keys().next() {
            let others = match self.from.len() - 1 {
                0 => String::new(),
                n => format!(" (and {n} more)"),
            };
            return Err(self.error(format_args!(
                "{name}{others} belongs to a variant of the network that is not supported here"
            )));
        }
        let [width, _] = self.done("patch_embed.weight")?;
        let [mlp, _] = self.done("blocks.0.mlp.fc1.weight")?;
        let [qkv, _] = self.done("blocks.0.attn.qkv.weight")?;
        model.shape.clear();
        model.width = width;
        model.mlp = mlp;
        model.depth = (0..).take_while(|n| self.exists(&format!("blocks.{n}.norm1.gain"))).count();
        let kv_heads = if model.kv_heads == 0 { model.heads } else { model.kv_heads };
        let expected = (model.heads + 2 * kv_heads) * model.head_dim;
        if qkv != expected {
            return Err(self.error(format_args!(
                "model.heads = {} heads of {} and {kv_heads} for keys and values each make {expected} rows, but \
                 queries, keys and values have {qkv} together; set model.heads and model.kv_heads as the network has \
                 them",
                model.heads, model.head_dim
            )));
        }
        if let Ok([pool_mlp, _]) = self.done("pool.mlp.fc1.weight")
            && pool_mlp != mlp
        {
            return Err(self.error(format_args!(
                "the pooling head's MLP is {pool_mlp} wide and the blocks' is {mlp}; only equal widths are supported"
            )));
        }
        if !self.exists("head.weight") {
            // A network without a classifier: the identity, so that its logits are its features.
            let identity = (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 }).collect();
            self.put("head.weight", &[width, width], identity);
        }
        let is_qk = |name: &str| name.ends_with("q_norm.gain") || name.ends_with("k_norm.gain");
        let gain = |name: &str| name.ends_with(".gain") && !is_qk(name);
        model.norm_bias = self.equalise(gain);
        model.qkv_bias = self
            .equalise(|n| n.ends_with(".attn.qkv.weight") || n == "pool.q.weight" || n == "pool.kv.weight");
        model.proj_bias = self.equalise(|n| n.ends_with(".attn.proj.weight") || n == "pool.proj.weight");
        model.mlp_bias = self.equalise(|n| n.ends_with("fc1.weight") || n.ends_with("fc2.weight"));
        model.patch_bias = self.exists("patch_embed.bias");
        model.head_bias = self.exists("head.bias");
        model.patch_norm_in = self.exists("patch_embed.norm_in.gain");
        model.patch_norm_out = self.exists("patch_embed.norm_out.gain");
        model.final_norm = self.exists("norm.gain");
        model.head_norm = self.exists("head_norm.gain");
        model.pool_mlp = self.exists("pool.mlp.fc1.weight");
        model.pool_qk_norm = self.exists("pool.q_norm.gain");
        model.pool_query_norm = self.exists("pool.norm.gain");
        if self.exists("blocks.0.scale1") {
            // Any value but 0 switches LayerScale on; the weights replace it.
            model.layer_scale = if model.layer_scale > 0.0 { model.layer_scale } else { 1e-5 };
        } else {
            model.layer_scale = 0.0;
        }
        match self.to.tensors.get("blocks.0.attn.q_norm.gain") {
            None => model.qk_norm = QkNormKind::None,
            Some((_, gain)) => model.qk_norm_per_head = gain.len() != model.head_dim,
        }
        Ok(self.to)
    }

    /// Sets the head count from the norms of queries and keys (`head_dim`), from the configuration, or from
    /// the named shape of this width. `inner` is the width of all heads together.
    pub(super) fn heads(&self, model: &mut ModelConfig, inner: usize, head_dim: Option<usize>) -> Result<()> {
        let heads = match head_dim {
            Some(0) => 0,
            Some(head_dim) => inner / head_dim,
            None if model.heads > 0 => model.heads,
            None => SHAPES.iter().find(|s| s.width == inner).map_or(0, |s| s.heads),
        };
        if heads == 0 || !inner.is_multiple_of(heads) {
            return Err(self.error(format_args!(
                "the file does not tell the number of attention heads; set model.heads to a divisor of {inner}"
            )));
        }
        (model.heads, model.head_dim) = (heads, inner / heads);
        Ok(())
    }

    fn exists(&self, name: &str) -> bool {
        self.to.tensors.contains_key(name)
    }

    fn done<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let shape = self.to.tensors.get(name).map(|(shape, _)| shape.clone()).unwrap_or_default();
        <[usize; N]>::try_from(shape).map_err(|shape| {
            self.error(format_args!("{name} (converted) has shape {shape:?}, expected {N} dimensions"))
        })
    }

    /// Whether any of the chosen modules has a bias; if so, gives the others a bias of zeros.
    fn equalise(&mut self, choose: impl Fn(&str) -> bool) -> bool {
        let bias = |name: &str| {
            let stem = name.trim_end_matches("weight").trim_end_matches("gain");
            format!("{stem}bias")
        };
        let chosen: Vec<_> = self
            .to
            .tensors
            .iter()
            .filter(|(name, _)| choose(name))
            .map(|(name, (shape, _))| (bias(name), shape.first().copied().unwrap_or(1)))
            .collect();
        let any = chosen.iter().any(|(bias, _)| self.exists(bias));
        if any {
            for (bias, len) in chosen {
                self.to.tensors.entry(bias).or_insert_with(|| (vec![len], vec![0.0; len]));
            }
        }
        any
    }
}
