//! `trencadis train --device cuda --ranks N` over the fake driver and an NCCL that stands in: what ranks with a GPU each
//! ask both for.

use std::fs;

use crate::fake::library;
use crate::fake_training::{Done, Place};

/// A model that two ranks can share, a step that two can, and an evaluation.
const SHARED: [&str; 4] = ["model.heads=2", "train.accumulate=2", "train.steps=4", "train.eval_every=4"];

/// A run on four GPUs, and the log of NCCL.
fn train(words: &str, sets: &[&str]) -> (Done, Vec<String>) {
    let place = Place::new();
    library("fake_libnccl.c", &place.0.path().join("libnccl.so.2"));
    let log = place.0.path().join("nccl.log");
    let settings = [("FAKE_CUDA_DEVICES", "4"), ("FAKE_NCCL_LOG", log.to_str().unwrap())];
    let done = place.train(words, &[&SHARED, sets].concat(), &settings);
    (done, fs::read_to_string(&log).unwrap_or_default().lines().map(String::from).collect())
}

/// Trains, evaluates, saves, and leaves every communicator in order.
#[test]
fn every_mesh_trains_over_nccl() {
    for (words, ranks, graphs) in [
        ("--ranks 2", 2, true),
        ("--ranks 2 --tensor 2", 2, false),
        ("--ranks 4 --tensor 2", 4, false),
        ("--ranks 2 --no-graph", 2, false),
    ] {
        let (done, log) = train(words, &[]);
        let done = done.succeeds();
        let count = |part: &str| log.iter().filter(|line| line.contains(part)).count();
        // All ranks, and both axes where they have others; the tensor axis twice.
        let tensor = words.contains("--tensor");
        let data = ranks / if tensor { 2 } else { 1 };
        let groups = 1 + usize::from(data > 1) + if tensor { 2 } else { 0 };
        assert_eq!(count("joins"), groups * ranks, "{words}: {log:#?}");
        assert_eq!((count("leaves"), count("aborts")), (groups * ranks, 0), "{words}: {log:#?}");
        // Launches that wait for flags are never taken into graphs.
        assert_eq!(count(" captures ") > 0, graphs, "{words}");
        assert_eq!(done.count("captured ") > 0, graphs, "{words}");
        assert_eq!(count(" exchange") > 0, tensor, "{words}");
        assert_eq!(count(" reduce-scatter") > 0, data > 1, "{words}");
    }
}
