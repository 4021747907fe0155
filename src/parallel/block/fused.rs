//! Layers of a parallel block that are one product. Their parameters are put side by side for it: a copy, small
//! beside the product that it serves.

use bytemuck::Pod;

use super::backward::grad;
use super::params::Tensors;
use super::{Saved, ShardedBlock, needed, optional};
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::error::Result;
use crate::parallel::group::Group;
use crate::parallel::linear::{Grads, Operand};

/// `[a | b]`, of these widths.
pub(super) fn join_columns<R: Copy>(a: &[R], b: &[R], [a_width, b_width]: [usize; 2]) -> Vec<R> {
    let mut both = Vec::with_capacity(a.len() + b.len());
    for (a, b) in a.chunks_exact(a_width).zip(b.chunks_exact(b_width)) {
        both.extend_from_slice(a);
        both.extend_from_slice(b);
    }
    both
}

/// The inverse.
pub(super) fn split_columns<R: Copy>(both: &[R], [a_width, b_width]: [usize; 2]) -> (Vec<R>, Vec<R>) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for row in both.chunks_exact(a_width + b_width) {
        a.extend_from_slice(&row[..a_width]);
        b.extend_from_slice(&row[a_width..]);
    }
    (a, b)
}

/// Queries, keys, values, then the first layer of the MLP.
pub(super) fn input_weight<R: Copy>(params: &Tensors<R>) -> Vec<R> {
    [needed(params, "attn.qkv.weight"), needed(params, "mlp.fc1.weight")].concat()
}

/// The sum of both biases, as both results are added.
pub(super) fn output_bias<R: Real>(params: &Tensors<R>) -> Option<Vec<R>> {
    let mut biases = ["attn.proj.bias", "mlp.fc2.bias"].into_iter().filter_map(|name| optional(params, name));
    let mut sum = biases.next()?.to_vec();
    biases.for_each(|bias| add_assign(&mut sum, bias));
    Some(sum)
}

impl ShardedBlock {
    /// Biases of queries, keys and values and of the first layer; zeros where one of the two has none.
    pub(super) fn input_bias<R: Real>(&self, params: &Tensors<R>) -> Option<Vec<R>> {
        let (qkv, fc1) = (optional(params, "attn.qkv.bias"), optional(params, "mlp.fc1.bias"));
        (qkv.is_some() || fc1.is_some()).then(|| {
            let or_zeros = |bias: Option<&[R]>, len| bias.map_or(vec![R::ZERO; len], <[R]>::to_vec);
            [or_zeros(qkv, self.qkv_width), or_zeros(fc1, self.mlp_width)].concat()
        })
    }

    /// Widths of this rank's part of what is projected, and of the hidden layer.
    pub(super) fn output_widths(&self) -> [usize; 2] {
        [self.attention.heads * self.attention.head_dim, self.mlp_width]
    }

    /// The projection of attention, and the second layer of the MLP beside it.
    pub(super) fn output_weight<R: Copy>(&self, params: &Tensors<R>) -> Vec<R> {
        let (proj, fc2) = (needed(params, "attn.proj.weight"), needed(params, "mlp.fc2.weight"));
        join_columns(proj, fc2, self.output_widths())
    }

    /// The gradient of the normalised x of the one product into both branches.
    pub(super) fn input_grad<R: Real + Pod>(
        &self,
        group: &Group,
        dqkv: &[R],
        dpre: &[R],
        saved: &Saved<R>,
        params: &Tensors<R>,
        grads: &mut Tensors<R>,
    ) -> Result<Vec<R>> {
        let both = join_columns(dqkv, dpre, [self.qkv_width, self.mlp_width]);
        let weight = input_weight(params);
        let mut dw = vec![R::ZERO; weight.len()];
        let mut db = vec![R::ZERO; self.qkv_width + self.mlp_width];
        let mut dy = vec![R::ZERO; saved.y1.len()];
        let products = Grads { dx: &mut dy, dw: &mut dw, db: Some(&mut db) };
        self.qkv.backward(group, products, &both, Operand::Local(&saved.y1), &weight)?;
        let (dw_qkv, dw_fc1) = dw.split_at(self.qkv_width * self.width);
        let (db_qkv, db_fc1) = db.split_at(self.qkv_width);
        add_assign(grad(grads, "attn.qkv.weight"), dw_qkv);
        add_assign(grad(grads, "mlp.fc1.weight"), dw_fc1);
        add_biases(grads, params, [("attn.qkv.bias", db_qkv), ("mlp.fc1.bias", db_fc1)]);
        Ok(dy)
    }

    /// The gradients of what is projected and of the hidden layer, from that of the one product out of both
    /// branches.
    pub(super) fn output_grad<R: Real + Pod>(
        &self,
        group: &Group,
        dbranch: &[R],
        saved: &Saved<R>,
        params: &Tensors<R>,
        grads: &mut Tensors<R>,
    ) -> Result<(Vec<R>, Vec<R>)> {
        let widths = self.output_widths();
        let both = join_columns(&saved.attended, &saved.hidden, widths);
        let weight = self.output_weight(params);
        let mut dw = vec![R::ZERO; weight.len()];
        let mut db = vec![R::ZERO; self.width];
        let mut dboth = vec![R::ZERO; both.len()];
        let products = Grads { dx: &mut dboth, dw: &mut dw, db: Some(&mut db) };
        self.proj.backward(group, products, dbranch, Operand::Local(&both), &weight)?;
        let (dw_proj, dw_fc2) = split_columns(&dw, widths);
        add_assign(grad(grads, "attn.proj.weight"), &dw_proj);
        add_assign(grad(grads, "mlp.fc2.weight"), &dw_fc2);
        add_biases(grads, params, [("attn.proj.bias", &db), ("mlp.fc2.bias", &db)]);
        Ok(split_columns(&dboth, widths))
    }
}

/// Adds gradients of the biases that there are.
fn add_biases<R: Real>(grads: &mut Tensors<R>, params: &Tensors<R>, biases: [(&str, &[R]); 2]) {
    for (name, db) in biases.into_iter().filter(|(name, _)| params.contains_key(*name)) {
        add_assign(grad(grads, name), db);
    }
}
