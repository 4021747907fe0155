//! Views: pictures as they were decoded become normalised patches on the device.
//!
//! | kernel | result |
//! |---|---|
//! | `view_resize` | the pixels of every picture at its target's size, cut, mirrored and resized as its [`Axis`] tables say |
//! | `view_mean` | the mean luma of pictures before the ops that need it |
//! | `view_patches` | patches after the [`Op`]s of their picture, mixed with those of its partner, as normalised rows of bf16 |
//!
//! The family has no file in `src/cpu`: what the kernels compute is what the host does without them, and that is
//! [`data::view`](crate::data::view), [`data::augment`](crate::data::augment) and [`data::mix`](crate::data::mix). The
//! values are the same to the bit.
//!
//! The host describes a batch as [`Picture`]s, whose [`Record`]s and bytes lie in device memory. The kernels follow them
//! without looking: that a record leads nowhere outside is the duty of whoever writes it, as [`Picture::new`] and
//! [`records`] do.

mod axis;
mod checked;
mod picture;
mod raw;

pub use axis::{Axis, Tap};
pub use checked::{Operands, Views};
pub use picture::{MOST_OPS, Mixed, Op, Picture, Record, Shares, Source, records};
pub use raw::{PatchesParams, ResizeParams, launch_patches, launch_resize};

pub use super::registry::view as instances;
