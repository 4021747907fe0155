//! The CUDA half of the device layer over a driver that runs nothing (`fake_libcuda.c`): what it asks the
//! driver for, and what it says of drivers and GPUs that will not do.

use trencadis::device::{Device, Kernels, Launch, RawStream, TensorBoxes, TensorElement, TensorSwizzle};
use trencadis::kernels::registry;

use crate::any_device::{capture_refuses, counts, round_trips};
use crate::fake::{Fake, INSIDE};

#[test]
fn what_was_found_is_said() {
    let text = Fake::new().inspect(&[("FAKE_CUDA_DEVICES", "2")]);
    for part in [
        "GPU 0             Fake GPU 0, compute capability 9.0\n",
        "GPU 1             Fake GPU 1, compute capability 9.0\n",
        "  memory          16.0 GiB, L2 cache 50.0 MiB\n",
        "  multiprocessors 132 at up to 1980 MHz\n",
        "  shared memory   227 KiB a block, 228 KiB a multiprocessor\n",
        "CUDA 13.0\n",
        "  kernels         machine code for sm_90\n",
        " by nvcc 13.0.1 for sm_90\n",
        "\nmodels run on     Fake GPU 0, 16.0 GiB\n",
    ] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

#[test]
fn whatever_will_not_do_is_one_sentence() {
    let fake = Fake::new();
    for (name, value, part) in [
        ("FAKE_CUDA_VERSION", "12040", "GPU               none: the NVIDIA driver supports CUDA 12.4 and"),
        ("FAKE_CUDA_VERSION", "34", "GPU               none: the libcuda that was found is the stub"),
        ("FAKE_CUDA_INIT", "100", "GPU               none: the NVIDIA driver finds no GPU"),
        (
            "FAKE_CUDA_INIT",
            "999",
            "GPU               none: the NVIDIA driver does not start: CUDA_ERROR_FAKE",
        ),
        ("FAKE_CUDA_DEVICES", "0", "GPU               none: the NVIDIA driver finds no GPU"),
        ("FAKE_CUDA_CAPABILITY", "75", "  kernels         none: Fake GPU 0 has compute capability 7.5 and"),
        ("FAKE_CUDA_CAPABILITY", "86", "are for sm_90 and Fake GPU 0 has compute capability 8.6; build"),
        ("TRENCADIS_KERNELS", "/absent", "kernels           none: /absent/manifest.txt: cannot be read"),
    ] {
        let text = fake.inspect(&[(name, value)]);
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
        let runs_on = text.lines().find(|line| line.starts_with("models run on     cpu, ")).unwrap();
        let (_, reason) = runs_on.split_once("(no GPU: ").unwrap();
        assert!(reason.ends_with(')') && !reason.contains(';'), "{runs_on}");
    }
}

#[test]
fn memory_streams_and_graphs_ask_for_the_right_things() {
    let log = Fake::new().runs("memory_and_streams", &[]);
    let count = |part: &str| log.iter().filter(|line| line.starts_with(part)).count();
    assert_eq!(count("alloc"), count("free"), "{log:#?}");
    assert_eq!(
        count("stream, flags 1"),
        count("end of stream"),
        "every stream is a non-blocking one: {log:#?}"
    );
    assert!(count("pin 4000, flags 0") == 1 && count("unpin") == 2, "not write-combined: {log:#?}");
    assert!(count("capture, mode 2") == 3 && count("graph of 0 launches") == 1, "{log:#?}");
    assert_eq!(count("end of graph"), 3, "{log:#?}");
    assert_eq!(log.last().unwrap(), "release 0", "the context goes last: {log:#?}");
    // The buffer that was dropped within the capture was freed after it.
    let at = |part: &str| log.iter().position(|line| line.starts_with(part)).unwrap();
    assert!(!log[at("capture")..at("graph of")].iter().any(|line| line.starts_with("free")), "{log:#?}");
    // What a graph may use was freed after it; what came later, at once.
    let [kept, later, next] = ["free 1001", "free 2001", "alloc 3001"].map(at);
    assert!(later < kept && kept < next, "{log:#?}");
    assert!(log[later..kept].iter().any(|line| line == "end of graph"), "{log:#?}");
    assert_eq!(count("wait"), 2, "the second copy of pinned memory waits for the first: {log:#?}");
}

/// A capture that spreads over two streams, and the memory of its graph.
fn graphs_keep_their_memory(device: &Device) {
    let (one, two) = (device.stream().unwrap(), device.stream().unwrap());
    let kept = device.zeros::<u8>(1001).unwrap();
    one.begin_capture().unwrap();
    two.wait(&one.record().unwrap()).unwrap();
    for (error, part) in [
        (two.end_capture().err().unwrap(), "begun on another stream"),
        (kept.download().err().unwrap(), "end all captures before memory is read"),
    ] {
        assert!(error.to_string().contains(part) && error.exit_code() == 2, "{error}");
    }
    drop(two);
    let graph = one.end_capture().unwrap();
    drop(kept);
    drop(device.zeros::<u8>(2001).unwrap());
    drop(graph);
    drop(device.zeros::<u8>(3001).unwrap());
}

#[test]
#[ignore = "for a process that has the fake driver: memory_streams_and_graphs_ask_for_the_right_things"]
fn memory_and_streams() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let device = Device::cuda(0).unwrap();
    round_trips(&device);
    capture_refuses(&device);
    graphs_keep_their_memory(&device);
    let (one, two) = (device.stream().unwrap(), device.stream().unwrap());
    let (buffer, mut pinned) = (device.zeros::<u8>(10).unwrap(), device.pinned::<u8>(10).unwrap());
    buffer.write_pinned(&one, &mut pinned).unwrap();
    buffer.read_pinned(&two, &mut pinned).unwrap();
    assert_eq!(pinned.read().unwrap(), [0; 10]);
    // An abandoned capture does not keep memory from being freed.
    let stream = device.stream().unwrap();
    stream.begin_capture().unwrap();
    drop(stream);
    let error = device.alloc::<u8>(17 << 30).err().unwrap();
    assert_eq!(
        error.to_string(),
        "17408.0 MiB of GPU memory cannot be had: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    );
    let error = Device::cuda(3).err().unwrap();
    assert_eq!(
        error.to_string(),
        "GPU 3 was asked for and the last one is GPU 0; choose a number from 0 to 0"
    );
    // Another thread has no context yet.
    let copy = device.clone();
    std::thread::spawn(move || copy.upload(&[1u32]).unwrap().download().unwrap()).join().unwrap();
}

#[test]
fn memory_ends_where_the_gpu_says() {
    let fake = Fake::new();
    let text = fake.inspect(&[("FAKE_CUDA_MEMORY", &(48u64 << 30).to_string())]);
    assert!(text.contains("  memory          48.0 GiB, L2"), "{text}");
    assert!(text.contains("models run on     Fake GPU 0, 48.0 GiB\n"), "{text}");
    let log = fake.runs("little_memory", &[("FAKE_CUDA_MEMORY", "3000000")]);
    let count = |part: &str| log.iter().filter(|line| line.starts_with(part)).count();
    assert_eq!((count("alloc"), count("alloc 1500000")), (count("free"), 2), "{log:#?}");
}

#[test]
#[ignore = "for a process that has the fake driver: memory_ends_where_the_gpu_says"]
fn little_memory() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let device = Device::cuda(0).unwrap();
    assert_eq!((device.info().memory_bytes, device.free_bytes().unwrap()), (3_000_000, 3_000_000));
    counts(&device);
    let large = device.zeros::<u8>(1_500_000).unwrap();
    assert_eq!((device.allocated_bytes(), device.free_bytes().unwrap()), (1_500_000, 1_500_000));
    let error = device.zeros::<u8>(1_500_001).err().unwrap();
    assert_eq!(
        error.to_string(),
        "1.4 MiB of GPU memory cannot be had: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    );
    assert_eq!((error.exit_code(), device.allocated_bytes()), (1, 1_500_000));
    // What a graph may use is not free, though no buffer has it any more.
    let stream = device.stream().unwrap();
    stream.begin_capture().unwrap();
    let graph = stream.end_capture().unwrap();
    drop(large);
    assert_eq!((device.allocated_bytes(), device.free_bytes().unwrap()), (0, 1_500_000));
    drop(graph);
    assert_eq!(device.free_bytes().unwrap(), 3_000_000);
    device.zeros::<u8>(1_500_000).unwrap();
    // Another device of the process has buffers of its own and the same memory.
    let other = Device::cuda(0).unwrap();
    let buffer = other.zeros::<u8>(1000).unwrap();
    assert_eq!((device.allocated_bytes(), device.free_bytes().unwrap()), (0, 2_999_000));
    assert_eq!((other.allocated_bytes(), buffer.len()), (1000, 1000));
}

#[test]
fn a_lost_gpu_is_told_by_whatever_comes_next() {
    let log = Fake::new().runs("a_lost_gpu", &[("FAKE_CUDA_FAIL_AFTER", "2")]);
    let count = |part: &str| log.iter().filter(|line| line.starts_with(part)).count();
    assert_eq!(count("graph of"), 1, "{log:#?}");
    assert_eq!((count("stream"), count("end of graph")), (count("end of stream"), 1), "{log:#?}");
    assert_eq!(count("free"), 0, "nothing is known to have ended: {log:#?}");
    assert_eq!(log.last().unwrap(), "release 0", "{log:#?}");
}

#[test]
#[ignore = "for a process that has the fake driver: a_lost_gpu_is_told_by_whatever_comes_next"]
fn a_lost_gpu() {
    let (Some((name, threads)), true) = (a_kernel(), std::env::var_os(INSIDE).is_some()) else { return };
    let device = Device::cuda(0).unwrap();
    let (stream, buffer) = (device.stream().unwrap(), device.upload(&[1u8; 10]).unwrap());
    let (start, mut pinned) = (stream.record().unwrap(), device.pinned::<u8>(10).unwrap());
    stream.begin_capture().unwrap();
    let graph = stream.end_capture().unwrap();
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(buffer.download().unwrap(), [1; 10]);

    let launch = Launch::new([1, 1, 1], threads, 0);
    // SAFETY: refused.
    let launched = || unsafe { device.kernels().launch(&name, launch, stream.raw(), &[0u64; 3]) };
    for (outcome, part) in [
        (graph.launch(&stream), "a graph cannot be launched: "),
        (stream.synchronize(), "the GPU has failed: "),
        (start.synchronize(), "the GPU has failed: "),
        (stream.wait(&start), "a stream cannot wait for an event: "),
        (stream.record().map(drop), "no event can be made on the GPU: "),
        (stream.begin_capture(), "a graph cannot be captured: "),
        (buffer.download().map(drop), "the GPU has failed: "),
        (buffer.write(&stream, &[2; 10]), "data cannot be copied to the GPU: "),
        (buffer.read_pinned(&stream, &mut pinned), "data cannot be copied from the GPU: "),
        (device.zeros::<u8>(1).map(drop), "0.0 MiB of GPU memory cannot be had: "),
        (device.free_bytes().map(drop), "the GPU has failed: "),
        (device.stream().map(drop), "no stream can be made on the GPU: "),
        (launched(), "cannot be loaded: "),
        (graph.launch(&stream), "a graph cannot be launched: "),
    ] {
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains(part), "`{part}` is missing in: {error}");
        assert!(
            error.to_string().ends_with(": CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 1);
    }
}

#[test]
fn launches_carry_their_attributes() {
    let Some((name, threads)) = a_kernel() else { return };
    let fake = Fake::new();
    let log = fake.runs("launches", &[]);
    let launches: Vec<_> = log.iter().filter(|line| line.starts_with("launch")).collect();
    let block = format!("block {threads},1,1");
    assert_eq!(
        launches,
        [
            &format!("launch {name} grid 7,2,1 {block} shared 0 on 2, first parameter 11"),
            &format!("launch {name} grid 4,1,1 {block} shared 50000 cluster 2,1,1 on 2, first parameter 11"),
            &format!("launch {name} grid 4,1,1 {block} shared 60000 dependent 1 on 2, first parameter 11"),
            &format!(
                "launch {name} grid 4,1,1 {block} shared 49152 cluster 4,1,1 dependent 1 on 2, first parameter 11"
            ),
            &format!("launch {name} grid 3,1,1 {block} shared 0 resident 1 on 2, first parameter 11"),
            &format!("launch {name} grid 1,1,1 {block} shared 0 on 0, first parameter 12"),
        ]
    );
    let count = |part: &str| log.iter().filter(|line| line.contains(part)).count();
    assert_eq!(count(&format!("{name} may have {} bytes", 227 * 1024)), 1, "{log:#?}");
    assert_eq!(count("graph of 4 launches"), 2, "{log:#?}");
    assert_eq!((count("load sm80"), count("unload sm80")), (4, 2), "one for each Kernels: {log:#?}");
    fake.runs("a_missing_symbol", &[("FAKE_CUDA_MISSING", &name)]);
}

/// The variable makes every launch of the device dependent but those whose blocks wait for one another, and none of
/// another engine's streams.
#[test]
fn launches_are_dependent_where_that_is_asked_for() {
    if a_kernel().is_none() {
        return;
    }
    for (value, dependent) in [("1", 4), ("0", 2), ("", 2)] {
        let log = Fake::new().runs("launches", &[("TRENCADIS_DEPENDENT", value)]);
        let lines: Vec<_> = log.iter().filter(|line| line.contains("dependent 1")).collect();
        assert_eq!(lines.len(), dependent, "{log:#?}");
        assert!(lines.iter().all(|line| line.contains("on 2") && !line.contains("resident")), "{log:#?}");
    }
}

/// What was compiled for compute_80 does not wait for the kernel before it, even on a newer GPU.
#[test]
fn kernels_that_cannot_wait_are_not_started_early() {
    if a_kernel().is_none() {
        return;
    }
    for (made_for, early) in [("80", 0), ("90", 2), ("100", 2)] {
        let log = Fake::new().runs("launches", &[("FAKE_CUDA_PTX", made_for)]);
        assert_eq!(log.iter().filter(|line| line.contains("dependent 1")).count(), early, "{log:#?}");
    }
}

#[test]
fn tensor_maps_say_what_was_asked() {
    let log = Fake::new().runs("tensor_maps", &[]);
    let maps: Vec<_> = log.iter().filter(|line| line.starts_with("tensor map")).collect();
    // Types, swizzles and the fetch from L2 by the driver's numbers; steps of 1, not interleaved, zeros outside.
    assert_eq!(
        maps,
        [
            "tensor map of 9 at 0x1000: sizes 100 7 strides 208 box 64 8 steps 1 1, interleave 0 swizzle 3 L2 3 fill 0",
            "tensor map of 7 at 0x2000: sizes 40 6 5 strides 160 960 box 16 2 3 steps 1 1 1, interleave 0 swizzle 2 L2 3 fill 0",
        ]
    );
}

#[test]
#[ignore = "for a process that has the fake driver: tensor_maps_say_what_was_asked"]
fn tensor_maps() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let device = Device::cuda(0).unwrap();
    let matrix = TensorBoxes {
        element: TensorElement::Bf16,
        address: 0x1000,
        sizes: &[100, 7],
        strides: &[208],
        tile: &[64, 8],
        swizzle: TensorSwizzle::Bytes128,
    };
    let map = device.kernels().tensor_map(&matrix).unwrap();
    assert_eq!(bytemuck::bytes_of(&map), [0xab; 128]);
    let matrices = TensorBoxes {
        element: TensorElement::F32,
        address: 0x2000,
        sizes: &[40, 6, 5],
        strides: &[160, 960],
        tile: &[16, 2, 3],
        swizzle: TensorSwizzle::Bytes64,
    };
    device.kernels().tensor_map(&matrices).unwrap();
    let refused = device.kernels().tensor_map(&TensorBoxes { address: 8, ..matrix }).unwrap_err().to_string();
    assert_eq!(refused, "a tensor map cannot be made: the address 0x8 is not a multiple of 16");
}

/// Some kernel of the registry, and its threads.
fn a_kernel() -> Option<(String, u32)> {
    let kernel = registry::sources().into_iter().next()?.kernels.into_iter().next()?;
    Some((kernel.name, kernel.threads))
}

#[test]
#[ignore = "for a process that has the fake driver: launches_carry_their_attributes"]
fn launches() {
    let (Some((name, threads)), true) = (a_kernel(), std::env::var_os(INSIDE).is_some()) else { return };
    let error = Kernels::for_current_context().err().unwrap();
    assert!(error.to_string().starts_with("no CUDA context is current on this thread"), "{error}");

    let device = Device::cuda(0).unwrap();
    let stream = device.stream().unwrap();
    let launch = |launch: Launch| {
        // SAFETY: the fake driver runs nothing.
        unsafe { device.kernels().launch(&name, launch, stream.raw(), &[11u64, 0, 0]) }
    };
    launch(Launch::new([7, 2, 1], threads, 0)).unwrap();
    stream.begin_capture().unwrap();
    launch(Launch { cluster: 2, ..Launch::new([4, 1, 1], threads, 50_000) }).unwrap();
    launch(Launch { dependent: true, ..Launch::new([4, 1, 1], threads, 60_000) }).unwrap();
    launch(Launch { cluster: 4, dependent: true, ..Launch::new([4, 1, 1], threads, 49_152) }).unwrap();
    launch(Launch { resident: true, ..Launch::new([3, 1, 1], threads, 0) }).unwrap();
    let graph = stream.end_capture().unwrap();
    graph.launch(&stream).unwrap();
    graph.launch(&stream).unwrap();

    for (wrong, part) in [
        (Launch::new([1, 1, 1], threads + 32, 0), "threads a block and was launched with"),
        (Launch::new([1, 1, 1], threads, 233_000), "needs 233000 bytes of shared memory a block"),
        (Launch { cluster: 2, ..Launch::new([3, 1, 1], threads, 0) }, "clusters of 2 blocks"),
        (Launch { cluster: 0, ..Launch::new([3, 1, 1], threads, 0) }, "clusters of 0 blocks"),
        (Launch::new([1, 0, 1], threads, 0), "every side must be at least 1"),
    ] {
        let error = launch(wrong).unwrap_err().to_string();
        assert!(error.contains(&name) && error.contains(part), "{error}");
    }
    // SAFETY: refused.
    let outcome = unsafe {
        device.kernels().launch(&name, Launch::new([1, 1, 1], threads, 0), stream.raw(), &[0u64; 2])
    };
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("takes parameters of 24 bytes and was given 16"), "{error}");

    // As an engine would that has a context of its own: here the one that the device has made current.
    let kernels = Kernels::for_current_context().unwrap();
    assert_eq!(kernels.info().multiprocessors, 132);
    let own = RawStream(std::ptr::null_mut());
    // SAFETY: the fake driver runs nothing.
    unsafe { kernels.launch(&name, Launch::new([1, 1, 1], threads, 0), own, &[12u64, 0, 0]) }.unwrap();
}

#[test]
#[ignore = "for a process that has the fake driver: launches_carry_their_attributes"]
fn a_missing_symbol() {
    let (Some((name, threads)), true) = (a_kernel(), std::env::var_os(INSIDE).is_some()) else { return };
    let device = Device::cuda(0).unwrap();
    let stream = device.stream().unwrap();
    // SAFETY: refused.
    let outcome = unsafe {
        device.kernels().launch(&name, Launch::new([1, 1, 1], threads, 0), stream.raw(), &[0u64; 3])
    };
    let error = outcome.unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("the kernel {name} of ")) && error.contains("cannot be found"),
        "{error}"
    );
}
