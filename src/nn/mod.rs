//! Layers and their initial weights.

pub mod init;
