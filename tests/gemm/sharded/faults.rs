//! What is done wrong with chunks, and what is refused.

use trencadis::device::{Device, Ptr};
use trencadis::kernels::gemm::sharded::{Chunks, Done, Ready, ShardedGemm, ShardedPlan};
use trencadis::kernels::gemm::{
    Epilogue, GeluGrad, Gemm, HOPPER_TILES, Layout, Matrix, Shape, Store, Sum, TILES, Vector,
};
use trencadis::recipe::GeluKind;

use super::with_blocks;
use crate::support::devices::devices;

/// Faults that a device shows for sure only where chunks move as late or as early as they may.
#[cfg(feature = "emulator")]
mod planted {
    use trencadis::device::Device;
    use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
    use trencadis::kernels::gemm::sharded::Chunks;
    use trencadis::kernels::gemm::{Kind, Layout};

    use super::super::case::{Case, Fault, Moved, Results, bits};
    use super::super::{tiles, with_blocks};
    use crate::product::Product;

    /// The results of a case with a fault, of every tile, or what the emulator says of it.
    fn with_fault(policy: CopyPolicy, seed: u64, fault: Fault) -> Vec<Result<(), String>> {
        let device = Device::emulator(EmulatorOptions { policy, seed, ..EmulatorOptions::default() });
        let run = |tile: trencadis::kernels::gemm::Tile| {
            let chunks = Chunks::new(tile.m as usize / 2 + 16, vec![1, 0, 2]).unwrap();
            let product = Product::new(Layout::Nt, [chunks.batch(), 72, 136], None);
            let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
            case.moved = Moved::In;
            case.fault = fault;
            let results = case.run(&device).map_err(|error| error.to_string())?;
            let Results::Stored(out, _) = &results else { unreachable!("it is stored") };
            match out.iter().any(|x| x.is_nan()) {
                true => Err("NaN".into()),
                false if bits(&results) == bits(&case.chunk_by_chunk(&device)) => Ok(()),
                false => Err("other bits".into()),
            }
        };
        tiles(&device, Layout::Nt, Kind::Store).into_iter().map(run).collect()
    }

    #[test]
    fn chunks_that_are_not_waited_for_are_seen_to_be_missing() {
        for fault in [Fault::NoWait, Fault::FlagFirst] {
            for outcome in with_fault(CopyPolicy::AtWait, 0, fault) {
                assert_eq!(outcome, Err("NaN".into()), "{fault:?}");
            }
            // Early enough, nothing shows.
            assert!(with_fault(CopyPolicy::AtIssue, 0, fault).into_iter().all(|outcome| outcome.is_ok()));
        }
        assert!(with_fault(CopyPolicy::AtWait, 0, Fault::Nothing).into_iter().all(|outcome| outcome.is_ok()));
    }

    #[test]
    fn a_flag_that_nobody_raises_is_a_deadlock_that_names_it() {
        for policy in [CopyPolicy::AtWait, CopyPolicy::AtIssue, CopyPolicy::Random] {
            for outcome in with_fault(policy, 3, Fault::NeverRaised) {
                let told = outcome.unwrap_err();
                assert!(told.contains("deadlock") && told.contains("kernels/gemm/shards.cuh"), "{told}");
                // The third of three flags, before the count of blocks.
                assert!(
                    told.contains("byte 8 of an allocation of 16 bytes of global memory, which is 0"),
                    "{told}"
                );
            }
        }
    }

    /// Copied as soon as all warps but one have counted, a chunk is not whole.
    #[test]
    fn chunks_that_are_taken_early_are_not_whole() {
        for tile in tiles(&Device::emulator(EmulatorOptions::default()), Layout::Nt, Kind::Store) {
            let chunks = Chunks::new(tile.m as usize / 2 + 16, vec![1, 0, 2]).unwrap();
            let product = Product::new(Layout::Nt, [chunks.batch(), 72, 72], None);
            let taken = |fault: Fault, seed: u64| {
                let options =
                    EmulatorOptions { policy: CopyPolicy::AtIssue, seed, ..EmulatorOptions::default() };
                let device = Device::emulator(options);
                let mut case = Case::new(&product, &chunks, Kind::Store, with_blocks(tile, 2));
                (case.moved, case.fault) = (Moved::Out, fault);
                case.run(&device).is_ok()
            };
            assert!((0..4).all(|seed| taken(Fault::Nothing, seed)), "{tile:?}");
            assert!((0..4).any(|seed| !taken(Fault::TakenEarly, seed)), "{tile:?}");
        }
    }
}

/// What a launch says to a product of 2 chunks of 64 rows, otherwise right.
fn refusal(
    device: &Device,
    change: impl for<'a> Fn(&mut ShardedGemm<'a>, &mut Epilogue<'a>, &mut ShardedPlan),
) -> String {
    let memory = device.zeros(128 * 64).unwrap();
    let a = Matrix::of(&memory, 0, 64);
    let shape = Shape { layout: Layout::Nt, m: 128, n: 64, k: 64 };
    let chunks = Chunks::new(64, vec![0, 1]).unwrap();
    let gemm = Gemm { shape, a, b: a, live: Vector::none(), dependent: false };
    let mut sharded = ShardedGemm { gemm, chunks: &chunks, ready: None, done: None };
    let mut epilogue = Epilogue::Store(Store::plain(a));
    let mut plan = with_blocks(TILES[4], 2);
    assert!(sharded.check(&epilogue, &plan, device.info()).is_ok());
    change(&mut sharded, &mut epilogue, &mut plan);
    sharded.check(&epilogue, &plan, device.info()).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused() {
    for device in devices() {
        let told = refusal(&device, |sharded, _, _| sharded.gemm.shape.m = 120);
        assert!(told.contains("2 chunks of 64 rows; it must be their product"), "{told}");
        let told = refusal(&device, |sharded, _, _| sharded.gemm.shape.layout = Layout::Tn);
        assert!(told.contains("a product in chunks is NT or NN"), "{told}");
        let told = refusal(&device, |sharded, epilogue, _| {
            *epilogue = Epilogue::GeluGrad(GeluGrad {
                out: sharded.gemm.a,
                pre: sharded.gemm.a,
                gelu: GeluKind::Erf,
                bias_grad: Vector::none(),
                accumulate: Vector::none(),
            });
        });
        assert!(told.contains("stored or summed"), "{told}");
        let told = refusal(&device, |_, epilogue, _| {
            // SAFETY: nothing is launched.
            let squares = unsafe { Vector::raw(Ptr::from_raw(64), 1) };
            *epilogue = Epilogue::Sum(Sum { out: Matrix::none(), accumulate: Vector::none(), squares });
        });
        assert!(told.contains("leaves no squares"), "{told}");
        for tile in [TILES[0], HOPPER_TILES[1]] {
            let told = refusal(&device, |_, _, plan| plan.tile = tile);
            assert!(told.contains("there is no kernel of tiles of"), "{told}");
        }
        let told = refusal(&device, |_, _, plan| plan.blocks = 0);
        assert!(told.contains("the plan has 0 blocks"), "{told}");
        let told = refusal(&device, |_, _, plan| (plan.tile, plan.blocks) = (HOPPER_TILES[0], 3));
        assert!(told.contains("the plan has 3 blocks"), "{told}");
        let told = refusal(&device, |_, _, plan| plan.stages = 7);
        assert!(told.contains("the plan has 7 stages"), "{told}");

        let (ready, done) = (Ready::new(&device, 3).unwrap(), Done::new(&device, 2).unwrap());
        let memory = device.zeros(128 * 64).unwrap();
        let a = Matrix::of(&memory, 0, 64);
        let shape = Shape { layout: Layout::Nt, m: 128, n: 64, k: 64 };
        let chunks = Chunks::new(64, vec![0, 1]).unwrap();
        let gemm = Gemm { shape, a, b: a, live: Vector::none(), dependent: false };
        let sharded = ShardedGemm { gemm, chunks: &chunks, ready: Some(&ready), done: Some(&done) };
        let told = sharded.check(&Epilogue::Store(Store::plain(a)), &with_blocks(TILES[4], 2), device.info());
        assert!(told.unwrap_err().to_string().contains("ready is made for 3 chunks and there are 2"));
        let all = device.info().multiprocessors;
        let told =
            sharded.plan(&Epilogue::Store(Store::plain(a)), device.info(), all).unwrap_err().to_string();
        assert!(told.contains("so reserve fewer"), "{told}");
        let stream = device.stream().unwrap();
        assert!(ready.raise(&stream, 3).unwrap_err().to_string().contains("there is no chunk 3"));
        assert!(done.take(&stream, 2, 1).is_err());
    }
}
