//! Process groups, rings and sharded layers: every sharding against the unsharded result.

mod block;
mod device;
mod groups;
mod linear;
mod overlap;
mod steps;
#[path = "../support/mod.rs"]
mod support;
mod tcp;
mod whole;
