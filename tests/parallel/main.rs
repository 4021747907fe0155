//! Process groups, rings and sharded layers: every sharding against the unsharded result.

mod checkpoints;
mod device;
mod device_model;
mod groups;
mod linear;
mod model;
mod overlap;
mod steps;
#[path = "../support/mod.rs"]
mod support;
mod tcp;
mod whole;
