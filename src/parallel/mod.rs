//! Several ranks that train one model: process groups, meshes, and linear layers whose matrix products run
//! while the next operands are on their way.
//!
//! A [`Group`] has one interface whatever carries its messages: [`Ranks`] are threads of one process,
//! [`tcp`] connects processes that `torchrun`, `srun` or `mpirun` started ([`launch`]). [`MeshGroups`] are the
//! groups of a two-dimensional mesh. [`ring`] holds the schedules of the asynchronous parallel linear layers
//! (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters"), [`linear`] the layers.
//!
//! ```
//! use trencadis::parallel::run_ranks;
//!
//! let sums = run_ranks(4, |group| {
//!     let mut sum = [group.rank() as f32, 1.0];
//!     group.all_reduce(&mut sum)?;
//!     Ok(sum)
//! })?;
//! assert_eq!(sums, [[6.0, 4.0]; 4]);
//! # Ok::<(), trencadis::Error>(())
//! ```

pub mod collectives;
pub mod device;
pub mod group;
pub mod launch;
pub mod linear;
pub mod mesh;
pub mod ring;
pub mod tcp;
pub mod threads;
pub mod zero;

mod inbox;
mod transport;

pub use device::DeviceGroup;
pub use group::{Event, Group, Logged};
pub use linear::{Grads, Layout, Operand, ShardedLinear};
pub use mesh::{Mesh, MeshGroups, Place};
pub use ring::{Rings, Sharding};
pub use threads::{DEFAULT_TIMEOUT, Ranks, Simulation, run_ranks};
