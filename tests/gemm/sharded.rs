//! Products whose rows come and go in chunks: against f64, and bit for bit against a launch for each chunk, whenever
//! chunks come, in whatever order, again and again.

mod case;
mod faults;

use half::bf16;

use trencadis::device::Device;
use trencadis::kernels::gemm::sharded::{Chunks, ShardedPlan};
use trencadis::kernels::gemm::{Kind, Layout, SHARDED_TILES, Tile};
use trencadis::parallel::ring::{self, Direction};

use crate::product::{BF16, F32, Product, alike, with_tile};
use crate::support::devices::devices;
use case::{Case, Moved, Results, bits};

/// Tiles that a device has a sharded kernel of.
fn tiles(device: &Device, layout: Layout, kind: Kind) -> Vec<Tile> {
    let info = device.info();
    SHARDED_TILES
        .into_iter()
        .filter(|tile| tile.has_sharded(layout, kind) && (tile.hopper.is_none() || info.hopper))
        .filter(|&tile| with_tile(tile).shared_bytes() <= info.shared_per_block)
        .collect()
}

/// A plan with a tile, as small as it can be, and so many blocks.
fn with_blocks(tile: Tile, blocks: u32) -> ShardedPlan {
    let blocks = if tile.hopper.is_some() { blocks.next_multiple_of(2) } else { blocks };
    ShardedPlan { tile, stages: 3, group: 2, blocks }
}

/// The emulator under every policy and in several orders; a GPU several times.
fn again() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut all: Vec<Device> = devices()
        .into_iter()
        .filter(|device| device.info().driver.is_some())
        .flat_map(|gpu| vec![gpu; 10])
        .collect();
    #[cfg(feature = "emulator")]
    {
        use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
        let orders = [
            (0, CopyPolicy::AtWait),
            (1, CopyPolicy::AtWait),
            (2, CopyPolicy::AtIssue),
            (3, CopyPolicy::Random),
            (4, CopyPolicy::Random),
            (5, CopyPolicy::Random),
        ];
        all.extend(orders.map(|(seed, policy)| {
            Device::emulator(EmulatorOptions { seed, policy, ..EmulatorOptions::default() })
        }));
    }
    all
}

/// Compares what all the launches of a case gave with f64, and with a launch for each chunk.
#[track_caller]
fn check(device: &Device, case: &Case<'_>) -> Results {
    let results = case.run(device).unwrap();
    let want = &case.product.value;
    match &results {
        Results::Stored(out, _) => {
            let got: Vec<f64> = out.iter().map(|x| x.to_f64()).collect();
            if case.plain {
                alike(&format!("{case:?}"), &got, want, BF16);
            }
        }
        Results::Summed(out) => {
            let got: Vec<f64> = out.iter().copied().map(f64::from).collect();
            alike(&format!("{case:?}"), &got, want, F32);
        }
    }
    assert!(bits(&results) == bits(&case.chunk_by_chunk(device)), "{case:?}: other bits than chunk by chunk");
    results
}

/// Chunks of a rank, as its ring brings or takes them.
fn order(rank: usize, size: usize, gather: bool, direction: Direction) -> Vec<usize> {
    let steps = if gather {
        ring::all_gather(rank, size, direction)
    } else {
        ring::reduce_scatter(rank, size, direction)
    };
    steps.iter().map(|step| step.multiply).collect()
}

/// Every number of ranks, with rows that no tile divides, dead rows within a chunk and from its begin on.
#[test]
fn chunks_of_every_number_of_ranks() {
    for device in devices() {
        for (i, size) in [1usize, 2, 3, 4, 8].into_iter().enumerate() {
            for layout in [Layout::Nt, Layout::Nn] {
                for kind in [Kind::Store, Kind::Sum] {
                    for (j, tile) in tiles(&device, layout, kind).into_iter().enumerate() {
                        let rank = (i + j) % size;
                        let rows = if (i + j) % 2 == 0 { 40 } else { tile.m as usize + 8 };
                        let gather = (i + j + usize::from(kind == Kind::Sum)) % 2 == 0;
                        let chunks = Chunks::new(rows, order(rank, size, gather, Direction::Right)).unwrap();
                        let live = [None, Some(size * rows - 13), Some(rows * (size / 2))][(i + j) % 3];
                        let product = Product::new(layout, [size * rows, 72, 72], live);
                        let plan = with_blocks(tile, 3);
                        check(&device, &Case::new(&product, &chunks, kind, plan));
                    }
                }
            }
        }
    }
}

/// Halves of chunks come and go in both directions, each on a stream of its own.
#[test]
fn rings_in_two_directions() {
    for device in devices() {
        for tile in tiles(&device, Layout::Nt, Kind::Store) {
            for gather in [true, false] {
                let ways = [Direction::Right, Direction::Left].map(|way| order(2, 4, gather, way));
                let rows = 2 * (tile.m as usize / 2 + 12);
                let chunks = Chunks::of_rings(rows, &ways).unwrap();
                let product = Product::new(Layout::Nt, [4 * rows, 136, 64], Some(4 * rows - 9));
                let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 5));
                case.streams = 2;
                check(&device, &case);
            }
        }
    }
}

/// Bias, GELU and what is kept before it.
#[test]
fn epilogues_of_chunks_are_those_of_whole_products() {
    for device in devices() {
        for tile in tiles(&device, Layout::Nt, Kind::Store) {
            let chunks = Chunks::new(tile.m as usize + 24, vec![1, 2, 0]).unwrap();
            let product = Product::new(Layout::Nt, [chunks.batch(), 200, 72], Some(chunks.batch() - 70));
            let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
            case.plain = false;
            check(&device, &case);
        }
    }
}

/// Flags early, late and at random, in the order of the tiles and in others, on one stream and on many; the same bits.
#[test]
fn chunks_come_whenever_they_come() {
    let layout = Layout::Nn;
    let mut first: Vec<Option<Vec<u32>>> = vec![None; SHARDED_TILES.len()];
    for device in again() {
        for tile in tiles(&device, layout, Kind::Store) {
            let rows = tile.m as usize / 2 + 16;
            let chunks = Chunks::new(rows, vec![2, 1, 0, 3]).unwrap();
            let product = Product::new(layout, [4 * rows, 72, 136], None);
            for (brought, streams) in [(vec![2, 1, 0, 3], 1), (vec![3, 0, 1, 2], 1), (vec![0, 1, 2, 3], 3)] {
                let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
                (case.brought, case.streams) = (brought, streams);
                let got = bits(&check(&device, &case));
                // Of a GPU and the emulator, the bits are those of each.
                if device.info().driver.is_none() {
                    let place = SHARDED_TILES.iter().position(|&other| other == tile).unwrap();
                    assert!(*first[place].get_or_insert_with(|| got.clone()) == got, "{case:?}");
                }
            }
        }
    }
}

/// Launches with the same flags, and a captured graph that is replayed: nobody lowers anything in between, and what is
/// gathered is NaN again before each.
#[test]
fn flags_are_low_again_for_the_next_launch() {
    for device in again() {
        for tile in tiles(&device, Layout::Nt, Kind::Store) {
            let rows = tile.m as usize / 2 + 16;
            let chunks = Chunks::new(rows, vec![1, 0, 2]).unwrap();
            // The last chunk is dead: nobody multiplies it, but it comes.
            for live in [None, Some(2 * rows - 3)] {
                let product = Product::new(Layout::Nt, [3 * rows, 72, 64], live);
                let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
                case.launches = 3;
                let eager = bits(&check(&device, &case));
                case.captured = true;
                assert!(bits(&check(&device, &case)) == eager, "{case:?}");
            }
        }
    }
}

/// Each chunk is brought only when the one before has been computed and taken: by one launch, or it would not end.
#[test]
fn chunks_are_computed_while_others_have_not_come() {
    for device in again() {
        for tile in tiles(&device, Layout::Nt, Kind::Store) {
            let rows = tile.m as usize / 2 + 16;
            let chunks = Chunks::new(rows, vec![2, 0, 1]).unwrap();
            let product = Product::new(Layout::Nt, [3 * rows, 72, 136], None);
            let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
            case.one_by_one = true;
            check(&device, &case);
        }
    }
}

/// By events: copies begin before the launch ends, and it begins before they end.
#[test]
fn copies_run_beside_the_launch_on_a_gpu() {
    for device in devices().into_iter().filter(|device| device.info().driver.is_some()) {
        let chunks = Chunks::new(1024, (0..8).collect()).unwrap();
        let product = Product::new(Layout::Nt, [8192, 1024, 1024], None);
        for kind in [Kind::Store, Kind::Sum] {
            for moved in [Moved::In, Moved::Out] {
                let mut case = Case::new(&product, &chunks, kind, with_blocks(SHARDED_TILES[4], 1));
                case.plan = case.planned(&device, 4);
                case.moved = moved;
                check(&device, &case);
                let [copies, launch] = case.intervals(&device).unwrap();
                assert!(copies[0] < launch[1] && launch[0] < copies[1], "{case:?}: {copies:?} {launch:?}");
            }
        }
    }
}

/// A plan of the model, with all of the device but what is left to transports.
#[test]
fn plans_of_the_model_are_taken() {
    for device in devices() {
        let chunks = Chunks::new(72, vec![0, 1, 2]).unwrap();
        for kind in [Kind::Store, Kind::Sum] {
            let product = Product::new(Layout::Nt, [216, 136, 64], None);
            let mut case = Case::new(&product, &chunks, kind, with_blocks(SHARDED_TILES[4], 1));
            case.plan = case.planned(&device, 4);
            assert!(case.plan.blocks <= 4 * (device.info().multiprocessors - 4));
            check(&device, &case);
        }
    }
}

/// Operand rows that nobody brought are NaN.
fn poison(len: usize) -> Vec<bf16> {
    vec![bf16::NAN; len]
}

/// What moved without the launch being over is whole: it was copied as soon as it was counted.
#[test]
fn what_is_counted_is_written() {
    for device in again() {
        for kind in [Kind::Store, Kind::Sum] {
            for tile in tiles(&device, Layout::Nt, kind) {
                let rows = tile.m as usize + 8;
                let chunks = Chunks::new(rows, vec![1, 2, 0]).unwrap();
                let product = Product::new(Layout::Nt, [3 * rows, tile.n as usize + 8, 64], None);
                let mut case = Case::new(&product, &chunks, kind, with_blocks(tile, 2));
                case.moved = Moved::Out;
                check(&device, &case);
            }
        }
    }
}
