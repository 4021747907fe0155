//! Memory of a rank on a GPU: that of an engine on a device that only counts, see [`DeviceMemory::plan`], and so exactly
//! what a run allocates.
//!
//! With P the elements of the rank's pieces of all parameters, padded as the kernels ask for:
//!
//! | kind | bytes | source |
//! |---|---|---|
//! | weights | 6P: f32, and the copy in bf16 that products read or others gather | `autograd::device` |
//! | moments | 8P (AdamW, LAMB), 4P (SGD), 2P and 4 for each row and column (Adafactor) | `train::engine` |
//! | moving average | 6P where it is kept, as the weights | |
//! | gradients | 4P, f32 | |
//! | gathered weights, gradients of blocks | the two arenas of what comes and goes with the units, and sums on their way | `autograd::device::gathered` |
//! | activations | the arena of the recorded step | [`ArenaPlan`](crate::autograd::device::ArenaPlan) |
//! | workspace | what launches share: of a tensor axis, gathered operands too | [`Op::prepare`](crate::autograd::Op::prepare) |
//! | input, evaluation | two batches; a third, and what evaluations need besides | [`DeviceMemory`] |

use super::memory::RankMemory;
use crate::device::DeviceInfo;
use crate::error::Result;
use crate::parallel::Mesh;
use crate::recipe::Recipe;
use crate::train::engine::DeviceMemory;

/// Bytes of an element of weights with their copies, of the moving average with its copy, of gradients.
const STATE: [usize; 3] = [6, 6, 4];

/// Memory of the first rank of `mesh` on such a device.
///
/// # Errors
/// A model or batch that the kernels do not take, or that cannot be shared out.
pub fn memory(
    info: &DeviceInfo,
    recipe: &Recipe,
    classes: usize,
    slots: usize,
    mesh: Mesh,
) -> Result<RankMemory> {
    let memory = DeviceMemory::plan(info, recipe, classes, slots, mesh.place(0))?;
    Ok(by_kind(&memory, recipe.train.ema > 0.0))
}

/// The memory of an engine by what it is for; `average` tells whether it keeps a moving average.
pub fn by_kind(memory: &DeviceMemory, average: bool) -> RankMemory {
    let [weights, averages, gradients] = STATE;
    let averages = if average { averages } else { 0 };
    let elements = (memory.state - memory.moments) / (weights + averages + gradients);
    RankMemory {
        weights: weights * elements,
        moments: memory.moments,
        average: averages * elements,
        gradients: gradients * elements,
        gathered: memory.gathered,
        unit_gradients: memory.unit_gradients,
        activations: memory.activations,
        input: memory.input,
        workspace: memory.workspace,
        messages: 0,
        evaluation: memory.evaluation,
    }
}
