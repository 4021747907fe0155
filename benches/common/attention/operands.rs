//! Operands of attention over a batch, in as many sets as exceed the cache, and plans that are ready to run on them.

use half::bf16;
use trencadis::cpu::attention::AttentionConfig;
use trencadis::device::{Buffer, DeviceInfo, Stream};
use trencadis::kernels::attention::{
    Attention, Backward, BackwardPlan, Forward, ForwardPlan, Limits, Schedule,
};
use trencadis::recipe::QkNormKind;
use trencadis::{Error, Result};

use crate::common::gpu::{Gpu, Rotated};
use crate::common::shapes::Images;

/// One of the two passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
}

/// How a pass runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Plan {
    Forward(ForwardPlan),
    Backward(BackwardPlan),
}

/// A plan with work lists and a workspace of its own.
pub struct Ready {
    pub plan: Plan,
    schedule: Schedule,
    workspace: Buffer<u8>,
}

/// All of it, on the device; with RMS norm of q and k.
pub struct Operands {
    attention: Attention,
    /// Rows of each image.
    lengths: Vec<usize>,
    pub sets: usize,
    qkv: Rotated<bf16>,
    dout: Rotated<bf16>,
    out: Rotated<bf16>,
    dqkv: Rotated<bf16>,
    lse: Vec<Buffer<f32>>,
    gains: [Buffer<f32>; 2],
    dgains: [Buffer<f32>; 2],
    starts: Vec<i32>,
    cu_seqlens: Buffer<i32>,
}

/// What a pass wrote: rows, and lse or the gradients of both gains.
pub struct Results {
    pub rows: Vec<bf16>,
    pub floats: Vec<Vec<f32>>,
}

/// Elements of a result that are of the same order: their root mean square tells what is near.
pub struct Group {
    /// What they are, for messages.
    pub name: String,
    pub values: Vec<f32>,
}

impl Results {
    /// Whether both are the same, bit for bit.
    pub fn same_bits(&self, other: &Self) -> bool {
        let floats =
            |results: &Self| results.floats.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        let rows = [self, other].map(|results| bytemuck::cast_slice::<bf16, u16>(&results.rows));
        rows[0] == rows[1] && floats(self) == floats(other)
    }
}

impl Pass {
    /// Every pass.
    pub const ALL: [Self; 2] = [Self::Forward, Self::Backward];

    /// What a table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "attention_forward_rms",
            Self::Backward => "attention_backward_rms",
        }
    }

    /// Useful floating-point operations: of the matrix products scores and out forward, scores, dP, dV, dQ and dK
    /// backward.
    pub fn operations(self, images: &Images, width: usize) -> f64 {
        let products = images.squares() * width as f64;
        match self {
            Self::Forward => 4.0 * products,
            Self::Backward => 10.0 * products,
        }
    }

    /// The plans of a device for a head dim; the first is the one that is chosen.
    ///
    /// # Errors
    /// A head dim that no kernel serves on the device.
    pub fn plans(self, head_dim: usize, device: &DeviceInfo) -> Result<Vec<Plan>> {
        let plans: Vec<Plan> = match self {
            Self::Forward => ForwardPlan::plans(head_dim, device).into_iter().map(Plan::Forward).collect(),
            Self::Backward => BackwardPlan::plans(head_dim, device).into_iter().map(Plan::Backward).collect(),
        };
        match plans.is_empty() {
            true => {
                Err(Error::usage(format!("{} runs no attention with a head dim of {head_dim}", device.name)))
            }
            false => Ok(plans),
        }
    }

    /// The plans for the kernels that every GPU runs; the first is the best of them.
    ///
    /// # Errors
    /// As for [`plans`](Self::plans).
    pub fn portable_plans(self, head_dim: usize, device: &DeviceInfo) -> Result<Vec<Plan>> {
        self.plans(head_dim, &DeviceInfo { hopper: false, ..device.clone() })
    }
}

impl Plan {
    /// Which images are short.
    pub fn limits(&self) -> Limits {
        match self {
            Self::Forward(plan) => plan.limits,
            Self::Backward(plan) => plan.limits,
        }
    }
}

impl Operands {
    /// Random ones; `images` may be followed by rows of none.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(
        gpu: &Gpu,
        heads: usize,
        head_dim: usize,
        images: &Images,
        padding: usize,
        sets: usize,
    ) -> Result<Self> {
        let (width, tokens) = (heads * head_dim, images.tokens() + padding);
        let norm = QkNormKind::Rms;
        let config = AttentionConfig { norm, gain_per_head: true, ..AttentionConfig::new(heads, head_dim) };
        let starts = images.cu_seqlens();
        let gain = |i: usize| (0..width).map(|j| 0.75 + ((i + 3 * j) % 5) as f32 / 8.0).collect::<Vec<f32>>();
        let zeros = |len: usize| gpu.device.zeros::<f32>(len);
        Ok(Self {
            attention: Attention { config, tokens, slots: images.lengths.len() },
            lengths: images.lengths.clone(),
            sets,
            qkv: gpu.random(sets, 3 * tokens * width)?,
            dout: gpu.random(sets, tokens * width)?,
            out: gpu.room(sets, tokens * width)?,
            dqkv: gpu.room(sets, 3 * tokens * width)?,
            lse: (0..sets).map(|_| zeros(tokens * heads)).collect::<Result<_>>()?,
            gains: [gpu.device.upload(&gain(0))?, gpu.device.upload(&gain(1))?],
            dgains: [zeros(width)?, zeros(width)?],
            cu_seqlens: gpu.device.upload(&starts)?,
            starts,
        })
    }

    /// Sets that exceed the cache.
    pub fn sets(gpu: &Gpu, heads: usize, head_dim: usize, images: &Images) -> usize {
        gpu.sets(2 * 8 * images.tokens() * heads * head_dim)
    }

    /// Makes work lists and workspace for a plan.
    ///
    /// # Errors
    /// The device has no room.
    pub fn ready(&self, gpu: &Gpu, plan: Plan) -> Result<Ready> {
        let Attention { tokens, slots, .. } = self.attention;
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let schedule = Schedule::new(&gpu.device, plan.limits(), tokens, slots)?.with_longest(longest);
        schedule.launch(&gpu.stream, &self.cu_seqlens, Some(&self.starts))?;
        gpu.stream.synchronize()?;
        let bytes = match &plan {
            Plan::Forward(plan) => self.attention.forward_workspace_bytes(plan, longest),
            Plan::Backward(plan) => self.attention.backward_workspace_bytes(plan, longest, true),
        };
        Ok(Ready { plan, schedule, workspace: gpu.device.alloc(bytes.max(16))? })
    }

    /// Runs one set by a plan. The backward pass reads what the forward pass has written there.
    ///
    /// # Errors
    /// A plan that the kernels do not take, a device that fails.
    pub fn launch(&self, stream: &Stream, set: usize, ready: &Ready) -> Result<()> {
        let width = self.attention.config.heads * self.attention.config.head_dim;
        let [q, k, v] = [0, 1, 2].map(|i| self.qkv.rows(set, i * width, 3 * width));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.dqkv.rows(set, i * width, 3 * width));
        let affine = [Some(&self.gains[0]), None, Some(&self.gains[1]), None];
        let (cu_seqlens, schedule) = (&self.cu_seqlens, &ready.schedule);
        let (out, lse) = (self.out.rows(set, 0, width), &self.lse[set]);
        match &ready.plan {
            Plan::Forward(plan) => {
                let operands = Forward {
                    q,
                    k,
                    v,
                    affine,
                    rope: None,
                    cu_seqlens,
                    schedule,
                    out,
                    lse,
                    statistics: None,
                    workspace: Some(&ready.workspace),
                };
                self.attention.forward(stream, plan, &operands)
            }
            Plan::Backward(plan) => {
                let operands = Backward {
                    q,
                    k,
                    v,
                    out,
                    lse,
                    dout: self.dout.rows(set, 0, width),
                    affine,
                    rope: None,
                    cu_seqlens,
                    schedule,
                    dq,
                    dk,
                    dv,
                    daffine: [Some(&self.dgains[0]), None, Some(&self.dgains[1]), None],
                    accumulate: None,
                    workspace: &ready.workspace,
                };
                self.attention.backward(stream, plan, &operands)
            }
        }
    }

    /// Writes NaN over the rows of set 0 that a pass is to write.
    ///
    /// # Errors
    /// The device has failed.
    pub fn spoil(&self, stream: &Stream, pass: Pass) -> Result<()> {
        let floats = match pass {
            Pass::Forward => self.out.fill(stream, bf16::NAN).map(|()| &self.lse[..1]),
            Pass::Backward => self.dqkv.fill(stream, bf16::NAN).map(|()| &self.dgains[..]),
        }?;
        floats.iter().try_for_each(|x| x.write(stream, &vec![f32::NAN; x.len()]))
    }

    /// What a pass wrote to set 0.
    ///
    /// # Errors
    /// The device has failed.
    pub fn results(&self, pass: Pass) -> Result<Results> {
        let floats = |buffers: &[Buffer<f32>]| buffers.iter().map(Buffer::download).collect::<Result<_>>();
        Ok(match pass {
            Pass::Forward => Results { rows: self.out.download()?, floats: floats(&self.lse[..1])? },
            Pass::Backward => Results { rows: self.dqkv.download()?, floats: floats(&self.dgains)? },
        })
    }

    /// Results by image, for the elements of a short one are larger; and the rows behind the last.
    pub fn groups(&self, pass: Pass, results: &Results) -> Vec<Group> {
        let Attention { config, tokens, .. } = self.attention;
        let width = config.heads * config.head_dim;
        let rows = |parts: usize| -> Vec<f32> {
            results.rows[..parts * tokens * width].iter().map(|x| x.to_f32()).collect()
        };
        let mut groups = Vec::new();
        match pass {
            Pass::Forward => {
                self.by_image(&mut groups, ["out"], width, &rows(1));
                self.by_image(&mut groups, ["lse"], config.heads, &results.floats[0]);
            }
            Pass::Backward => {
                self.by_image(&mut groups, ["dq", "dk", "dv"], width, &rows(3));
                for (of, values) in ["q", "k"].iter().zip(&results.floats) {
                    let name = format!("the gradient of the gain of {of}");
                    groups.push(Group { name, values: values.clone() });
                }
            }
        }
        groups
    }

    /// Cuts rows that hold `width` columns of each of `names` into images.
    fn by_image<const N: usize>(&self, to: &mut Vec<Group>, names: [&str; N], width: usize, values: &[f32]) {
        let ends = self.starts.iter().skip(1).map(|&end| end as usize).chain([self.attention.tokens]);
        let mut start = 0;
        for (image, end) in ends.enumerate() {
            for (i, name) in names.iter().enumerate() {
                let rows = values[start * N * width..end * N * width].chunks_exact(N * width);
                let values = rows.flat_map(|row| &row[i * width..(i + 1) * width]).copied().collect();
                let place = match self.lengths.get(image) {
                    Some(length) => format!("{name} of image {image} of {length} rows"),
                    None => format!("{name} behind the last image"),
                };
                to.push(Group { name: place, values });
            }
            start = end;
        }
    }
}
