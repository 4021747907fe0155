//! Collectives on device memory, of ranks that share one device, against those of the host: on the emulator, and on a
//! GPU where there is one.

use std::time::Duration;

use half::bf16;

use trencadis::Result;
use trencadis::device::{Buffer, Device, Stream};
use trencadis::kernels::measure::{MMA_VALUES, MmaParams, launch_mma, mma_threads};
use trencadis::parallel::collectives::part_of;
use trencadis::parallel::device::{DeviceTransport, Exchange};
use trencadis::parallel::ring::{Direction, volume};
use trencadis::parallel::{DeviceGroup, Group, Ranks, Rings, run_ranks};

use crate::support::devices::devices;

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

/// Numbers whose sum depends on the order in which it is taken.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((rank * 37 + i * 11) as f32 * 0.7).sin() * 10f32.powi(rank as i32 - 3)).collect()
}

fn rounded(rank: usize, len: usize) -> Vec<bf16> {
    values(rank, len).into_iter().map(bf16::from_f32).collect()
}

/// A rank of `device` and what it queues on.
fn joined(host: &Group, device: &Device) -> Result<(DeviceGroup, Stream)> {
    let group = DeviceGroup::new(host, device)?;
    assert_eq!((group.transport(), group.rank()), (DeviceTransport::Local, host.rank()));
    Ok((group, device.stream()?))
}

/// Elements `range` of a buffer.
fn part<T: bytemuck::Pod>(buffer: &Buffer<T>, range: std::ops::Range<usize>) -> Buffer<T> {
    buffer.view(range.start * size_of::<T>()..range.end * size_of::<T>()).unwrap()
}

#[test]
fn collectives_are_those_of_the_host_bit_for_bit() {
    for device in devices() {
        for size in SIZES {
            // Parts at odd addresses, and aligned ones of several blocks.
            for len in [5, 1056] {
                let device = device.clone();
                run_ranks(size, move |host| against_the_host(host, &device, len)).unwrap();
            }
        }
    }
}

fn against_the_host(host: &Group, device: &Device, len: usize) -> Result<()> {
    let (size, rank) = (host.size(), host.rank());
    let (group, stream) = joined(host, device)?;
    // What the host sends for the same, for the traffic of both to be compared.
    let twin = host.subgroup("twin", &(0..size).collect::<Vec<_>>())?;
    let alike = |what: &str| assert_eq!(group.sent(), twin.sent(), "{what}");

    let mut all = vec![0.0; len * size];
    twin.all_gather(&mut all, &values(rank, len))?;
    let all_device = device.alloc::<f32>(len * size)?;
    group.all_gather(&stream, &all_device, &device.upload(&values(rank, len))?)?;
    group.synchronize(&stream)?;
    assert_eq!(all_device.download()?, all);
    alike("all-gather");

    let mut mine = vec![0.0; len];
    twin.reduce_scatter(&mut mine, &values(rank, len * size))?;
    let mine_device = device.alloc::<f32>(len)?;
    group.reduce_scatter(&stream, &mine_device, &device.upload(&values(rank, len * size))?)?;
    group.synchronize(&stream)?;
    assert_eq!(mine_device.download()?, mine);
    alike("reduce-scatter");

    // Lengths that the ranks cannot share evenly, and fewer elements than ranks.
    for len in [len * size + 2, 1] {
        let mut reduced = values(rank, len);
        twin.all_reduce(&mut reduced)?;
        let reduced_device = device.upload(&values(rank, len))?;
        group.all_reduce(&stream, &reduced_device)?;
        group.synchronize(&stream)?;
        assert_eq!(reduced_device.download()?, reduced);
        alike("all-reduce");
    }

    let mut sent = values(rank, len);
    twin.broadcast(&mut sent, size - 1)?;
    let sent_device = device.upload(&values(rank, len))?;
    group.broadcast(&stream, &sent_device, size - 1)?;
    group.synchronize(&stream)?;
    assert_eq!(sent_device.download()?, sent);
    alike("broadcast");
    Ok(())
}

#[test]
fn bf16_is_summed_in_f32_and_rounded_once() {
    for device in devices() {
        for size in SIZES {
            let device = device.clone();
            let len = 37;
            let results = run_ranks(size, move |host| {
                let (group, stream) = joined(host, &device)?;
                let mine = device.alloc::<bf16>(len)?;
                let data = device.upload(&rounded(host.rank(), len * host.size()))?;
                group.reduce_scatter(&stream, &mine, &data)?;
                group.all_reduce(&stream, &data)?;
                group.synchronize(&stream)?;
                let part = part_of(data.len(), host.size(), host.rank()).len() as u64;
                let k = host.size() as u64;
                // A reduce-scatter, and an all-reduce of parts of the same length.
                assert_eq!(group.sent().iter().sum::<u64>(), 2 * ((k - 1) * len as u64 + (k - 1) * 2 * part));
                Ok((mine.download()?, data.download()?))
            });
            let mut sum = vec![0.0; len * size];
            for rank in 0..size {
                sum.iter_mut().zip(rounded(rank, len * size)).for_each(|(sum, x)| *sum += x.to_f32());
            }
            let sum: Vec<bf16> = sum.into_iter().map(bf16::from_f32).collect();
            for (rank, (mine, all)) in results.unwrap().into_iter().enumerate() {
                assert_eq!(mine, sum[rank * len..][..len]);
                assert_eq!(all, sum);
            }
        }
    }
}

#[test]
fn parts_may_lie_in_the_whole() {
    for device in devices() {
        for size in SIZES {
            let device = device.clone();
            let len = 24;
            let results = run_ranks(size, move |host| {
                let (group, stream) = joined(host, &device)?;
                let all = device.upload(&values(host.rank(), len * host.size()))?;
                let mine = part(&all, host.rank() * len..(host.rank() + 1) * len);
                group.reduce_scatter(&stream, &mine, &all)?;
                group.all_gather(&stream, &all, &mine)?;
                group.synchronize(&stream)?;
                // Elsewhere in the whole it would be overwritten under way.
                if host.size() > 1 {
                    let shifted = part(&all, 1..len + 1);
                    let error = shifted.copy_from(&stream, &part(&all, 0..len)).unwrap_err();
                    assert!(error.to_string().contains("overlaps"), "{error}");
                }
                all.download()
            });
            let mut sum = values(0, len * size);
            for rank in 1..size {
                sum.iter_mut().zip(values(rank, len * size)).for_each(|(sum, x)| *sum += x);
            }
            assert_eq!(results.unwrap(), vec![sum; size]);
        }
    }
}

/// An all-gather of `rows` rows of `cols` by a ring, which is what the layers do between their products.
fn ring_all_gather(host: &Group, device: &Device, rings: Rings, rows: usize, cols: usize) -> Result<()> {
    let (group, stream) = joined(host, device)?;
    let (rank, size) = (host.rank(), host.size());
    let all = device.alloc::<f32>(size * rows * cols)?;
    let chunk = |rank: usize, rows_of: &std::ops::Range<usize>| {
        part(&all, (rank * rows + rows_of.start) * cols..(rank * rows + rows_of.end) * cols)
    };
    chunk(rank, &(0..rows)).write(&stream, &values(rank, rows * cols))?;
    let parts = rings.parts(rows);
    for step in 0..size - 1 {
        let buffers: Vec<_> = parts
            .iter()
            .map(|(direction, rows)| {
                let at = |step| chunk(direction.behind(rank, step, size), rows);
                (at(step), at(step + 1))
            })
            .collect();
        let exchanges: Vec<_> = parts
            .iter()
            .zip(&buffers)
            .map(|(&(direction, _), (send, receive))| Exchange { direction, send, receive })
            .collect();
        group.exchange(&stream, &exchanges)?;
    }
    group.synchronize(&stream)?;
    let want: Vec<f32> = (0..size).flat_map(|rank| values(rank, rows * cols)).collect();
    assert_eq!(all.download()?, want);
    let bytes: Vec<u64> = volume(rings, rank, size, rows, cols).iter().map(|count| 4 * count).collect();
    assert_eq!(group.sent(), bytes);
    Ok(())
}

#[test]
fn neighbours_exchange_around_the_ring() {
    for device in devices() {
        for size in SIZES {
            for rings in [Rings::One, Rings::Two] {
                let device = device.clone();
                run_ranks(size, move |host| ring_all_gather(host, &device, rings, 7, 9)).unwrap();
            }
        }
        let device = device.clone();
        let to_itself = run_ranks(1, move |host| {
            let (group, stream) = joined(host, &device)?;
            let (send, receive) = (device.upload(&[1.0f32, 2.0])?, device.zeros(2)?);
            let exchange = Exchange { direction: Direction::Left, send: &send, receive: &receive };
            group.exchange(&stream, &[exchange])?;
            group.synchronize(&stream)?;
            assert_eq!(group.sent(), [0]);
            receive.download()
        });
        assert_eq!(to_itself.unwrap(), [[1.0, 2.0]]);
    }
}

/// What a rank gives to an operation goes at once, and its memory is written over by what comes next.
#[test]
fn memory_may_go_as_soon_as_an_operation_has_returned() {
    for device in devices() {
        let device = device.clone();
        let results = run_ranks(4, move |host| {
            let (group, stream) = joined(host, &device)?;
            let mut sums = Vec::new();
            for round in 0..12 {
                let sum = device.alloc::<f32>(300)?;
                let all = device.upload(&values(host.rank() + round, 1200))?;
                group.reduce_scatter(&stream, &sum, &all)?;
                drop(all);
                drop(device.upload(&vec![f32::NAN; 1200])?);
                sums.push(sum);
            }
            group.synchronize(&stream)?;
            sums.iter().map(Buffer::download).collect::<Result<Vec<_>>>()
        });
        for (rank, sums) in results.unwrap().into_iter().enumerate() {
            for (round, got) in sums.into_iter().enumerate() {
                let mut sum = values(round, 1200);
                for other in 1..4 {
                    sum.iter_mut().zip(values(other + round, 1200)).for_each(|(sum, x)| *sum += x);
                }
                assert_eq!(got, sum[rank * 300..][..300], "rank {rank}, round {round}");
            }
        }
    }
}

#[test]
fn a_rank_that_fails_ends_the_others() {
    for device in devices() {
        let device = device.clone();
        let result = Ranks::new(3).timeout(Duration::from_secs(60)).run(move |host| {
            let (group, stream) = joined(host, &device)?;
            let data = device.upload(&values(host.rank(), 10))?;
            group.all_reduce(&stream, &data)?;
            assert!(host.rank() != 1, "a bug");
            // Two of three wait for the one that has gone.
            group.all_reduce(&stream, &data)?;
            group.synchronize(&stream)
        });
        assert_eq!(result.unwrap_err().to_string(), "rank 1 panicked: a bug");
    }
}

#[test]
fn ranks_at_different_operations_are_told() {
    for device in devices() {
        let device = device.clone();
        let result = Ranks::new(2).timeout(Duration::from_secs(60)).run(move |host| {
            let (group, stream) = joined(host, &device)?;
            let (all, mine) = (device.zeros::<f32>(6)?, device.zeros::<f32>(3)?);
            if host.rank() == 0 {
                group.all_gather(&stream, &all, &mine)
            } else {
                group.reduce_scatter(&stream, &mine, &all)
            }
        });
        let error = result.unwrap_err().to_string();
        let (gather, scatter) = ("an all-gather of 24 bytes", "a reduce-scatter of 24 bytes");
        let said = |a: usize, one: &str, b: usize, other: &str| {
            format!("rank {a} is at {one} where rank {b} is at {other}: their programs or recipes differ")
        };
        assert!([said(0, gather, 1, scatter), said(1, scatter, 0, gather)].contains(&error), "{error}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for device in devices() {
        let device = device.clone();
        let refusals = run_ranks(2, move |host| {
            let (group, stream) = joined(host, &device)?;
            let [two, three] = [2, 3].map(|len| device.zeros::<f32>(len).unwrap());
            let said = |result: Result<()>| result.unwrap_err().to_string();
            let mut texts = vec![
                said(group.all_gather(&stream, &three, &two)),
                said(group.reduce_scatter(&stream, &two, &three)),
                said(group.broadcast(&stream, &two, 2)),
            ];
            stream.begin_capture()?;
            texts.push(said(group.all_reduce(&stream, &two)));
            stream.end_capture()?;
            #[cfg(feature = "emulator")]
            {
                let other = Device::emulator(Default::default());
                texts.push(said(group.all_reduce(&other.stream()?, &two)));
                texts.push(said(group.all_reduce(&stream, &other.zeros::<f32>(2)?)));
            }
            assert_eq!(group.sent(), [0, 0], "what was refused was not sent");
            Ok(texts)
        });
        for texts in refusals.unwrap() {
            for (text, part) in texts.iter().zip([
                "all-gather: 2 ranks have parts of 2 elements, and the whole has 3",
                "reduce-scatter: 2 ranks have parts of 2 elements, and the whole has 3",
                "broadcast: there is no rank 2 among 2",
                "cannot be captured; end the capture first",
                "must be those of the device of the group",
                "must be those of the device of the group",
            ]) {
                assert!(text.contains(part), "{text}");
            }
        }
    }
}

/// Ranks that have each a device of their own, and no GPU.
#[cfg(feature = "emulator")]
#[test]
fn devices_that_nothing_connects_are_refused_by_all() {
    let apart = |transport: Option<DeviceTransport>| {
        let result = run_ranks(3, move |host| {
            let device = Device::emulator(Default::default());
            match transport {
                None => DeviceGroup::new(host, &device).map(drop),
                Some(transport) => DeviceGroup::over(host, &device, transport).map(drop),
            }
        });
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    for transport in [None, Some(DeviceTransport::Nccl)] {
        let text = apart(transport);
        assert!(text.starts_with("rank 0 has no GPU, and NCCL"), "{text}");
    }
    let text = apart(Some(DeviceTransport::Local));
    assert!(text.starts_with("rank 1 has another device than rank 0"), "{text}");
}

/// On a GPU, the copies of a ring run while each rank computes on another stream.
#[test]
fn copies_run_beside_kernels() {
    for device in devices().into_iter().filter(|device| device.info().driver.is_some()) {
        let overlaps = run_ranks(2, move |host| {
            let (group, copying) = joined(host, &device)?;
            let computing = device.stream()?;
            let kernels = device.kernels();
            let values: Vec<bf16> = rounded(host.rank(), MMA_VALUES);
            let (values, out) = (device.upload(&values)?, device.alloc::<f32>(mma_threads(kernels))?);
            let len = 64 << 20;
            let (send, receive) = (device.zeros::<u8>(len)?, device.zeros::<u8>(len)?);
            let mut overlap = 0.0f32;
            // The first round loads code.
            for rounds in [1, 200_000] {
                let params = MmaParams { out: out.ptr(), values: values.ptr(), rounds };
                let start = computing.record()?;
                // SAFETY: the buffers have what the kernel reads and writes, and live until `synchronize`.
                unsafe { launch_mma(kernels, computing.raw(), &params)? };
                let end = computing.record()?;
                let copied_from = copying.record()?;
                for _ in 0..4 {
                    let exchange = Exchange { direction: Direction::Right, send: &send, receive: &receive };
                    group.exchange(&copying, &[exchange])?;
                }
                let copied = copying.record()?;
                computing.synchronize()?;
                group.synchronize(&copying)?;
                // From the later start to the earlier end.
                let later = start.elapsed_ms(&copied_from)?.max(0.0);
                let earlier = start.elapsed_ms(&copied)?.min(start.elapsed_ms(&end)?);
                overlap = earlier - later;
            }
            Ok(overlap)
        });
        for overlap in overlaps.unwrap() {
            assert!(overlap > 0.0, "copies and products lie {} ms apart", -overlap);
        }
    }
}
