//! What Hopper's kernel alone has: blocks that stay for many tiles, rings that go on from one to the next, warpgroups
//! that take turns, clusters of which a block lies outside the result.

use half::bf16;

use trencadis::device::Device;
use trencadis::kernels::gemm::{
    Epilogue, Gemm, HOPPER_TILES, Kind, Layout, Matrix, Plan, Scheme, Shape, Store, TILES, Tile, Vector,
};
use trencadis::recipe::GeluKind;

use crate::gradients::{slope, sum};
use crate::product::{FOREIGN, Product, with_tile};
use crate::store::{Ask, check};
use crate::support::devices::devices;

/// Devices that have the kernel.
fn hopper() -> impl Iterator<Item = Device> {
    devices().into_iter().filter(|device| device.info().hopper)
}

/// Stages of a tile's ring, of the epilogue without column sums.
fn stages(tile: Tile, layout: Layout) -> usize {
    let copied =
        |extent: u32, rows_are_k: bool| if rows_are_k { extent.next_multiple_of(64) } else { extent };
    let extents = copied(tile.m, layout == Layout::Tn) + copied(tile.n, layout != Layout::Nt);
    (232_448 - 2048 - 8 * 4096) / (128 * extents as usize)
}

/// What two tiles next to each other, and a little of a third, have: rows and columns.
fn three_tiles(tile: Tile) -> [usize; 2] {
    match tile.shares_a() {
        true => [tile.m as usize + 16, 2 * tile.n as usize + 8],
        false => [2 * tile.m as usize + 16, tile.n as usize + 8],
    }
}

/// Four pairs of tiles, two of which have a tile outside, by one cluster and by three, over so many stages that the
/// ring is hardly used, nearly full, full, and used again and again.
#[test]
fn rings_go_on_from_tile_to_tile() {
    for device in hopper() {
        for (i, tile) in HOPPER_TILES.into_iter().enumerate() {
            let layout = Layout::ALL[i % 3];
            let [m, n] = three_tiles(tile);
            let ring = stages(tile, layout);
            assert!((3..=6).contains(&ring), "{tile:?}: {ring}");
            for steps in [1, ring - 1, ring, 2 * ring + 1] {
                let k = 64 * steps - 8;
                let product = Product::new(layout, [m, n, k], None);
                let few = check(&device, &product, &with_tile(tile), Ask::default());
                let plan = Plan { clusters: 3, group: 2, ..with_tile(tile) };
                assert!(check(&device, &product, &plan, Ask::default()) == few, "{plan:?} over {k}");
            }
        }
    }
}

/// Heavy epilogues and slices of k over several tiles to a block.
#[test]
fn turns_alternate_whatever_is_written() {
    for device in hopper() {
        for (i, tile) in HOPPER_TILES.into_iter().enumerate() {
            let [m, n] = three_tiles(tile);
            if tile.has(Kind::GeluGrad) {
                let product = Product::new(Layout::Nn, [m, n, 200], Some(m - 20));
                slope(&device, &product, &with_tile(tile), GeluKind::Tanh, true, Some(1));
            }
            if tile.has(Kind::Sum) {
                let plan = Plan { splits: 3, clusters: 1 + i as u32 % 2, ..with_tile(tile) };
                sum(&device, &Product::new(Layout::Tn, [m, n, 325], Some(300)), &plan, Some(1));
            }
        }
    }
}

/// Pairs with a dead tile, and dead pairs between which nothing is multiplied.
#[test]
fn dead_rows_of_the_result() {
    let ask = Ask { bias: true, residual: true, ..Ask::default() };
    for device in hopper() {
        for tile in HOPPER_TILES {
            let m = 5 * tile.m as usize / 2;
            for live in [0, 1, tile.m as usize, tile.m as usize + 1, 2 * tile.m as usize] {
                check(&device, &Product::new(Layout::Nt, [m, 72, 64], Some(live)), &with_tile(tile), ask);
            }
        }
    }
}

/// The last live row of k before, at and behind the ends of stages and slices; slices that get none.
#[test]
fn dead_rows_of_k() {
    for device in hopper() {
        for tile in HOPPER_TILES.into_iter().filter(|tile| tile.has(Kind::Sum)) {
            for (i, live) in [0, 1, 63, 64, 65, 128, 200, 333].into_iter().enumerate() {
                let product = Product::new(Layout::Tn, [72, 136, 269], Some(live));
                let plan = Plan { splits: [1, 3, 5][i % 3], ..with_tile(tile) };
                sum(&device, &product, &plan, Some(i as i32 % 2));
            }
        }
    }
}

/// The emulator under every policy of its copies and in several orders; a GPU a hundred times.
fn again() -> Vec<Vec<Device>> {
    #[allow(unused_mut)]
    let mut groups: Vec<Vec<Device>> =
        hopper().filter(|device| device.info().driver.is_some()).map(|gpu| vec![gpu; 100]).collect();
    #[cfg(feature = "emulator")]
    {
        use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
        let orders = [
            (0, CopyPolicy::AtWait, 2),
            (1, CopyPolicy::AtIssue, 4),
            (2, CopyPolicy::Random, 6),
            (3, CopyPolicy::Random, 2),
            (3, CopyPolicy::Random, 2),
        ];
        groups.push(
            orders
                .map(|(seed, policy, resident_blocks)| {
                    let options =
                        EmulatorOptions { seed, policy, resident_blocks, ..EmulatorOptions::default() };
                    Device::emulator(options)
                })
                .into(),
        );
    }
    groups
}

#[test]
fn the_same_bits_in_every_order() {
    for group in again() {
        for (i, tile) in HOPPER_TILES.into_iter().enumerate() {
            let layout = Layout::ALL[(i + 1) % 3];
            let [m, n] = three_tiles(tile);
            let product = Product::new(layout, [m, n, 64 * stages(tile, layout) + 24], None);
            let plan = Plan { clusters: 2, ..with_tile(tile) };
            let ask = Ask { bias: true, gelu: Some(GeluKind::Erf), pre: true, ..Ask::default() };
            let first = check(&group[0], &product, &plan, ask);
            for device in &group[1..] {
                assert!(check(device, &product, &plan, ask) == first, "{plan:?}");
            }
        }
    }
}

/// Each of `rows` rows of `from`, which lie `FOREIGN` apart, in rows of `stride` from `offset` on; NaN around them.
fn spread(from: &[bf16], rows: usize, offset: usize, stride: usize) -> Vec<bf16> {
    let cols = from.len() / rows - FOREIGN;
    let mut out = vec![bf16::NAN; offset + rows * stride];
    for row in 0..rows {
        out[offset + row * stride..][..cols].copy_from_slice(&from[row * (cols + FOREIGN)..][..cols]);
    }
    out
}

/// Queries out of rows of queries, keys and values, say; and a result among others. A second product waits for it.
#[test]
fn operands_and_results_are_parts_of_wider_rows() {
    let (m, n, k) = (200, 136, 200);
    let shape = Shape { layout: Layout::Nt, m, n, k };
    let product = Product::new(Layout::Nt, [m, n, k], None);
    for device in hopper() {
        for tile in HOPPER_TILES {
            let plan = with_tile(tile);
            let stream = device.stream().unwrap();
            let run = |offset: usize, more: usize, dependent: bool| {
                let (inner, outer) = (k + FOREIGN + more, n + more);
                let a = device.upload(&spread(&product.a, m, offset, inner)).unwrap();
                let b = device.upload(&spread(&product.b, n, offset, inner)).unwrap();
                let y = device.upload(&vec![bf16::NAN; offset + m * outer]).unwrap();
                let z = device.alloc::<bf16>(m * m).unwrap();
                let first = Gemm {
                    shape,
                    a: Matrix::of(&a, offset, inner),
                    b: Matrix::of(&b, offset, inner),
                    live: Vector::none(),
                    dependent,
                };
                // z = y yᵀ
                let second = Gemm {
                    shape: Shape { layout: Layout::Nt, m, n: m, k: n },
                    a: Matrix::of(&y, offset, outer),
                    b: Matrix::of(&y, offset, outer),
                    ..first
                };
                let to_y = Epilogue::Store(Store::plain(Matrix::of(&y, offset, outer)));
                let to_z = Epilogue::Store(Store::plain(Matrix::of(&z, 0, m)));
                first.launch(&stream, &to_y, &plan, &Vector::none()).unwrap();
                second.launch(&stream, &to_z, &plan, &Vector::none()).unwrap();
                stream.synchronize().unwrap();
                let bits = |x: Vec<bf16>| x.into_iter().map(bf16::to_bits).collect::<Vec<_>>();
                let y = y.download().unwrap();
                let rows: Vec<bf16> =
                    (0..m).flat_map(|row| y[offset + row * outer..][..n].to_vec()).collect();
                assert!(rows.iter().all(|x| x.is_finite()), "{plan:?}");
                (bits(rows), bits(z.download().unwrap()))
            };
            let plain = run(0, 0, false);
            assert!(run(0, 0, true) == plain && run(24, 2 * k, true) == plain, "{plan:?}");
        }
    }
}

#[test]
fn plans_that_the_device_has_no_kernel_for_are_refused() {
    for device in devices() {
        let out = device.alloc::<bf16>(64 * 64).unwrap();
        let a = Matrix::of(&out, 0, 64);
        let shape = Shape { layout: Layout::Nt, m: 64, n: 64, k: 64 };
        let gemm = Gemm { shape, a, b: a, live: Vector::none(), dependent: false };
        let gelu_grad = Epilogue::GeluGrad(trencadis::kernels::gemm::GeluGrad {
            out: a,
            pre: a,
            gelu: GeluKind::Erf,
            bias_grad: Vector::none(),
            accumulate: Vector::none(),
        });
        let store = Epilogue::Store(Store::plain(a));
        let outcome = |epilogue: &Epilogue<'_>, plan: Plan| {
            gemm.check(epilogue, &plan, &Vector::none(), device.info()).map_err(|error| error.to_string())
        };
        let cooperative =
            HOPPER_TILES.into_iter().find(|tile| tile.hopper == Some(Scheme::Cooperative)).unwrap();
        let plan = with_tile(cooperative);
        assert_eq!(outcome(&store, plan).is_ok(), device.info().hopper);
        for (epilogue, plan) in [(&store, Plan { clusters: 0, ..plan }), (&gelu_grad, plan)] {
            let message = outcome(epilogue, plan).unwrap_err();
            assert!(message.contains("for Hopper"), "{message}");
        }
        assert!(outcome(&gelu_grad, with_tile(TILES[4])).is_ok());
    }
}
