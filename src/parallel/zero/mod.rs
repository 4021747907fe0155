//! Parameters, gradients and optimiser state shared out over the data axis (Rajbhandari et al. 2020, "ZeRO", stage
//! 3; Zhao et al. 2023, "PyTorch FSDP").
//!
//! A model's parameters are [`Units`]: what comes before the blocks, each block, what comes after. A rank keeps one
//! of the equal pieces of each unit, its gradients' and its moments'. While a block computes, the next one's
//! weights are on their way ([`Schedule`]); once its gradients are whole they are summed into the pieces, while the
//! block before computes. So beside its pieces a rank holds about two blocks. [`PiecedStore`] does this for the CPU
//! device.

mod schedule;
mod store;
mod units;

pub use schedule::{Action, Schedule, Span, Visit};
pub use store::{Channels, PiecedStore};
pub use units::{Slice, Unit, Units};
