//! Memory that a contrastive loss takes on the CPU device: a tile of scores a thread, never the matrix of them.

#[path = "support/memory.rs"]
mod memory;

use std::sync::atomic::Ordering;

use trencadis::cpu::contrastive::{CHUNK, Results, contrastive, scratch};
use trencadis::recipe::ContrastiveKind::{self, Sigmoid, Softmax};
use trencadis::rng::{Purpose, Stream};

use memory::{Counting, LIVE, PEAK};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WIDTH: usize = 16;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..len).map(|_| stream.uniform() - 0.5).collect()
}

/// The most that a loss with its gradients takes beside its operands and results.
fn peak(kind: ContrastiveKind, pairs: usize) -> usize {
    let (images, texts) = (random(pairs * WIDTH, 1), random(pairs * WIDTH, 2));
    let weights = vec![1f32; pairs];
    let (mut per_pair, mut dscale, mut dbias) = (vec![0f32; pairs], 0f32, 0f32);
    let (mut dimages, mut dtexts) = (vec![0f32; pairs * WIDTH], vec![0f32; pairs * WIDTH]);
    let mut most = 0;
    // The first run makes what threads keep.
    for _ in 0..2 {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let results = Results {
            per_pair: &mut per_pair,
            dimages: &mut dimages,
            dtexts: &mut dtexts,
            dscale: &mut dscale,
            dbias: (kind == Sigmoid).then_some(&mut dbias),
        };
        let bias = (kind == Sigmoid).then_some(-2.0);
        contrastive(results, &images, &texts, 2.0, bias, &weights, kind, 1.0);
        most = most.max(PEAK.load(Ordering::Relaxed) - before);
    }
    assert!(per_pair.iter().all(|x| x.is_finite() && *x > 0.0));
    most
}

#[test]
fn memory_grows_with_pairs_not_with_scores() {
    // What each thread keeps for products is as large as its L2 cache, on some machines larger than all scores here.
    // A chunk is one task, which runs where it is called.
    rayon::broadcast(|_| [Softmax, Sigmoid].map(|kind| peak(kind, CHUNK)));
    // What products pack and threads are told, whatever the number of pairs.
    let threads = rayon::current_num_threads();
    let constant = (threads + 1) * (4 * CHUNK * CHUNK + (64 << 10)) + (1 << 20);
    for kind in [Softmax, Sigmoid] {
        for pairs in [1500, 3000] {
            let (taken, told) = (peak(kind, pairs), 4 * scratch(pairs, WIDTH));
            assert!(taken <= told + constant, "{kind:?}, {pairs} pairs: {taken} bytes, {told} were told");
            assert!(taken < pairs * pairs * 4 / 2, "{kind:?}, {pairs} pairs: {taken} bytes");
        }
    }
}
