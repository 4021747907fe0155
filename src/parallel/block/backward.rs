//! The backward pass of a tensor-parallel block.

use bytemuck::Pod;

use super::params::{Split, Tensors};
use super::{Packed, Saved, ShardedBlock, affine, needed, optional};
use crate::cpu::attention::QkAffineGrad;
use crate::cpu::real::Real;
use crate::cpu::simd::add_assign;
use crate::cpu::{attention, gemm, norm, residual};
use crate::error::Result;
use crate::parallel::group::Group;
use crate::parallel::linear::{Grads, Operand, ShardedLinear};

impl ShardedBlock {
    /// The gradient of this rank's rows of the residual stream from that of the block's result. Those of its
    /// parts of the parameters are added to `grads`, which has an entry for each; of what all ranks hold, the sum
    /// over the ranks.
    ///
    /// # Errors
    /// Those of [`ShardedLinear::backward`].
    ///
    /// # Panics
    /// If a parameter or gradient is missing or a slice has another length than its shape: a bug of the caller,
    /// not of a user.
    pub fn backward<R: Real + Pod>(
        &self,
        group: &Group,
        dout: &[R],
        saved: &Saved<R>,
        params: &Tensors<R>,
        batch: &Packed<'_, R>,
        grads: &mut Tensors<R>,
    ) -> Result<Vec<R>> {
        // Apart from `grads`, which may hold sums of earlier batches already.
        let mut shared: Tensors<R> = self.shared(params);
        let mut dout = dout.to_vec();
        self.clear_padding(group, &mut dout, batch);

        let keep = self.second_keep(batch);
        let dbranch2 = self.residual(&mut shared, "scale2", &dout, &saved.branch2, params, keep);
        let (mut dpre, dattended) = match &self.fc2 {
            Some(fc2) => (linear(group, fc2, "mlp.fc2", &dbranch2, &saved.hidden, params, grads)?, None),
            None => {
                let (dattended, dhidden) = self.output_grad(group, &dbranch2, saved, params, grads)?;
                (dhidden, Some(dattended))
            }
        };
        gemm::gelu_grad(&mut dpre, &saved.pre, self.config.gelu);
        let mut dx1 = dout;
        if let Some(fc1) = &self.fc1 {
            let dy2 = linear(group, fc1, "mlp.fc1", &dpre, &saved.y2, params, grads)?;
            let dx = self.norm_grad(&mut shared, "norm2", &dy2, &saved.x1, &saved.stats2, params);
            add_assign(&mut dx1, &dx);
        }

        let dattended = match dattended {
            Some(dattended) => dattended,
            None => {
                let keep = batch.keep[0];
                let dbranch1 = self.residual(&mut shared, "scale1", &dx1, &saved.branch1, params, keep);
                linear(group, &self.proj, "attn.proj", &dbranch1, &saved.attended, params, grads)?
            }
        };
        let dqkv = self.attention_grad(&mut shared, &dattended, saved, params, batch, grads);
        let dy1 = match &self.fc1 {
            Some(_) => linear(group, &self.qkv, "attn.qkv", &dqkv, &saved.y1, params, grads)?,
            None => self.input_grad(group, &dqkv, &dpre, saved, params, grads)?,
        };
        let mut dx = self.norm_grad(&mut shared, "norm1", &dy1, &saved.x, &saved.stats1, params);
        add_assign(&mut dx, &dx1);
        self.sum_shared(group, shared, grads)?;
        Ok(dx)
    }

    /// Zeros for the gradients that are summed over the ranks.
    fn shared<R: Real>(&self, params: &Tensors<R>) -> Tensors<R> {
        params
            .iter()
            .filter(|(name, _)| self.is_summed(name))
            .map(|(name, data)| (name.clone(), vec![R::ZERO; data.len()]))
            .collect()
    }

    /// Whether every rank has a summand of the gradient of `name`.
    pub fn is_summed(&self, name: &str) -> bool {
        self.split(name) == Split::Whole && name != "attn.proj.bias" && name != "mlp.fc2.bias"
    }

    /// One sum over the ranks for all, in the order of their names.
    fn sum_shared<R: Real + Pod>(
        &self,
        group: &Group,
        shared: Tensors<R>,
        grads: &mut Tensors<R>,
    ) -> Result<()> {
        let mut all: Vec<R> = shared.values().flatten().copied().collect();
        group.all_reduce(&mut all)?;
        let mut rest = &all[..];
        for (name, part) in &shared {
            let (sum, tail) = rest.split_at(part.len());
            add_assign(grad(grads, name), sum);
            rest = tail;
        }
        Ok(())
    }

    fn residual<R: Real>(
        &self,
        shared: &mut Tensors<R>,
        scale: &str,
        dout: &[R],
        branch: &[R],
        params: &Tensors<R>,
        keep: Option<&[R]>,
    ) -> Vec<R> {
        let mut dbranch = vec![R::ZERO; dout.len()];
        let dscale = shared.get_mut(scale).map(Vec::as_mut_slice);
        residual::backward(&mut dbranch, dscale, dout, branch, optional(params, scale), keep, self.width);
        dbranch
    }

    fn norm_grad<R: Real>(
        &self,
        shared: &mut Tensors<R>,
        name: &str,
        dy: &[R],
        x: &[R],
        stats: &[R],
        params: &Tensors<R>,
    ) -> Vec<R> {
        let (gain, bias) = (format!("{name}.gain"), format!("{name}.bias"));
        let mut dx = vec![R::ZERO; x.len()];
        let (mut dgain, mut dbias) = (shared.remove(&gain), shared.remove(&bias));
        norm::backward(
            &mut dx,
            dgain.as_deref_mut(),
            dbias.as_deref_mut(),
            dy,
            x,
            stats,
            Some(needed(params, &gain)),
            self.width,
            self.config.norm,
        );
        shared.extend(
            [(gain, dgain), (bias, dbias)].into_iter().filter_map(|(name, data)| Some((name, data?))),
        );
        dx
    }

    fn attention_grad<R: Real>(
        &self,
        shared: &mut Tensors<R>,
        dattended: &[R],
        saved: &Saved<R>,
        params: &Tensors<R>,
        batch: &Packed<'_, R>,
        grads: &mut Tensors<R>,
    ) -> Vec<R> {
        const NAMES: [&str; 4] =
            ["attn.q_norm.gain", "attn.k_norm.gain", "attn.q_norm.bias", "attn.k_norm.bias"];
        // Of gains that each head has for itself, a rank has its own.
        let from = if self.config.qk_norm_per_head { grads } else { shared };
        let mut parts = NAMES.map(|name| from.remove(name));
        let [q_gain, k_gain, q_bias, k_bias] = parts.each_mut().map(Option::as_deref_mut);
        let mut dqkv = vec![R::ZERO; saved.qkv.len()];
        attention::backward(
            &self.attention,
            &mut dqkv,
            QkAffineGrad { q_gain, k_gain, q_bias, k_bias },
            dattended,
            &saved.attended,
            &saved.lse,
            &saved.qkv,
            affine(params),
            batch.cu_seqlens,
        );
        from.extend(NAMES.iter().zip(parts).filter_map(|(name, data)| Some(((*name).to_owned(), data?))));
        dqkv
    }
}

pub(super) fn grad<'a, R>(grads: &'a mut Tensors<R>, name: &str) -> &'a mut Vec<R> {
    grads.get_mut(name).unwrap_or_else(|| panic!("the gradient of parameter {name} is missing"))
}

/// The gradient of the operand `x` of the layer `name`; those of its parameters are added to `grads`.
fn linear<R: Real + Pod>(
    group: &Group,
    layer: &ShardedLinear,
    name: &str,
    dy: &[R],
    x: &[R],
    params: &Tensors<R>,
    grads: &mut Tensors<R>,
) -> Result<Vec<R>> {
    let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
    let mut dx = vec![R::ZERO; x.len()];
    // Taken out, as both are written at once; an error ends the ranks, and their gradients with them.
    let mut dw = std::mem::take(grad(grads, &weight));
    let mut db = grads.remove(&bias);
    let products = Grads { dx: &mut dx, dw: &mut dw, db: db.as_deref_mut() };
    layer.backward(group, products, dy, Operand::Local(x), needed(params, &weight))?;
    *grad(grads, &weight) = dw;
    grads.extend(db.map(|db| (bias, db)));
    Ok(dx)
}
