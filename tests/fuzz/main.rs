//! Files of weights and data that are not what they should be: every kind of file that is told apart by its content,
//! and a bounded run of mutated files through each reader.

mod formats;
#[path = "../support/memory.rs"]
mod memory;
mod mutants;
mod readers;
