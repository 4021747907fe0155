//! A thin recorded graph.
//!
//! A training step is recorded once: model code calls the functions of the op families
//! ([`gemm::linear`], [`attention::attention`], …), each of which appends a node; [`Graph::backward`]
//! walks the nodes in reverse and lets every op append its backward rule. Shapes are constants,
//! so memory ([`plan`]), arithmetic ([`Graph::flops`]) and the printed graph follow from the
//! record alone, before anything is allocated. [`exec::CpuExecutor`] runs the record.
//!
//! One file per op family; the forward op picks the CPU function or the kernel, and its backward
//! rule stands beside it.

pub mod attention;
pub mod backward;
pub mod contrastive;
pub mod device;
pub mod elementwise;
pub mod exec;
pub mod gemm;
pub mod graph;
pub mod loss;
pub mod norm;
pub mod op;
pub mod patch;
pub mod plan;
pub mod pool;
pub mod position;
pub mod recompute;
pub mod residual;
pub mod sharded;
pub mod split;

pub use device::DeviceExecutor;
pub use exec::{CpuExecutor, ParamStore, Rank};
pub use graph::{Extent, Graph, Kind, Node, ParamSpec, Pass, Tensor};
pub use op::{Io, Op, StepState, Workload};
pub use plan::Plan;
pub use split::{Shard, Split};
