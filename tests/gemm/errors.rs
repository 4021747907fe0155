//! What checked launches refuse. No memory is touched, so no device is needed.

use half::bf16;

use trencadis::Error;
use trencadis::device::{DeviceInfo, Ptr};
use trencadis::kernels::gemm::{
    BiasGrad, Epilogue, GeluGrad, Gemm, Layout, Matrix, Plan, Shape, Store, Sum, TILES, Vector,
};
use trencadis::recipe::GeluKind;

fn device() -> DeviceInfo {
    DeviceInfo { name: "a GPU".into(), ..DeviceInfo::h100() }
}

fn matrix<T>(address: u64, stride: usize, len: usize) -> Matrix<'static, T> {
    // SAFETY: nothing is launched.
    unsafe { Matrix::raw(Ptr::from_raw(address), stride, len) }
}

fn vector<T>(address: u64, len: usize) -> Vector<'static, T> {
    // SAFETY: nothing is launched.
    unsafe { Vector::raw(Ptr::from_raw(address), len) }
}

const FAR: u64 = 1 << 20;
const PLENTY: usize = 1 << 20;

fn good(layout: Layout) -> Gemm<'static> {
    Gemm {
        shape: Shape { layout, m: 64, n: 72, k: 80 },
        a: matrix(FAR, 88, PLENTY),
        b: matrix(2 * FAR, 88, PLENTY),
        live: vector(3 * FAR, 1),
        dependent: false,
    }
}

fn store() -> Store<'static> {
    Store {
        out: matrix(4 * FAR, 80, PLENTY),
        bias: vector(5 * FAR, 72),
        gelu: Some(GeluKind::Erf),
        pre: matrix(6 * FAR, 72, PLENTY),
        residual: matrix(4 * FAR, 80, PLENTY),
        gamma: vector(7 * FAR, 72),
        keep: vector(8 * FAR, 64),
    }
}

fn grad() -> GeluGrad<'static> {
    GeluGrad {
        out: matrix(4 * FAR, 80, PLENTY),
        pre: matrix(6 * FAR, 72, PLENTY),
        gelu: GeluKind::Tanh,
        bias_grad: vector(5 * FAR, 72),
        accumulate: vector(7 * FAR, 1),
    }
}

fn sum() -> Sum<'static> {
    Sum { out: matrix(4 * FAR, 76, PLENTY), accumulate: vector(7 * FAR, 1), squares: Vector::none() }
}

const PLAN: Plan = Plan { tile: TILES[2], stages: 3, splits: 1, group: 2, clusters: 0 };

fn outcome(gemm: &Gemm<'_>, epilogue: Epilogue<'_>, plan: Plan, workspace: Vector<'_, u8>) -> String {
    match gemm.check(&epilogue, &plan, &workspace, &device()) {
        Ok(()) => "fine".into(),
        Err(Error::Usage(message)) => message,
        Err(Error::Failure(message)) => panic!("not a usage error: {message}"),
    }
}

fn says(gemm: &Gemm<'_>, epilogue: Epilogue<'_>, expected: &[&str]) {
    let message = outcome(gemm, epilogue, PLAN, vector(9 * FAR, PLENTY));
    for expected in expected {
        assert!(message.contains(expected), "`{message}` does not say `{expected}`");
    }
}

#[test]
fn what_is_right_passes() {
    for layout in Layout::ALL {
        let gemm = good(layout);
        for epilogue in [Epilogue::Store(store()), Epilogue::GeluGrad(grad()), Epilogue::Sum(sum())] {
            says(&gemm, epilogue, &["fine"]);
        }
        says(&Gemm { live: Vector::none(), ..gemm }, Epilogue::Store(Store::plain(store().out)), &["fine"]);
        let none = Sum { accumulate: Vector::none(), ..sum() };
        says(&gemm, Epilogue::Sum(none), &["fine"]);
    }
}

#[test]
fn extents() {
    let with = |layout, m, n, k| Gemm { shape: Shape { layout, m, n, k }, ..good(layout) };
    let plain = Epilogue::Store(Store::plain(store().out));
    for (layout, m, n, k, expected) in [
        (Layout::Nt, 0, 72, 80, "m is 0"),
        (Layout::Nt, 64, 0, 80, "n is 0"),
        (Layout::Nn, 64, 72, 0, "k is 0"),
        (Layout::Nt, 1 << 31, 72, 80, "m is 2147483648"),
        (Layout::Nt, 64, 73, 80, "n is 73"),
        (Layout::Nt, 64, 72, 81, "k is 81"),
        (Layout::Nn, 64, 72, 84, "k is 84"),
        (Layout::Tn, 60, 72, 80, "m is 60"),
    ] {
        says(&with(layout, m, n, k), plain, &[expected]);
    }
    says(&with(Layout::Nt, 61, 72, 80), plain, &["fine"]);
    says(&with(Layout::Tn, 64, 72, 77), plain, &["fine"]);
}

#[test]
fn operands() {
    let gemm = good(Layout::Nt);
    let plain = Epilogue::Store(Store::plain(store().out));
    let a = |a| Gemm { a, ..gemm };
    says(&a(Matrix::none()), plain, &["a is null"]);
    says(&a(matrix(FAR + 2, 88, PLENTY)), plain, &["a lies at", "multiple of 16"]);
    says(&a(matrix(FAR, 84, PLENTY)), plain, &["rows of a", "84", "multiple of 8"]);
    says(&a(matrix(FAR, 72, PLENTY)), plain, &["rows of a", "at least 80"]);
    says(&a(matrix(FAR, 88, 63 * 88 + 79)), plain, &["a has memory for 5623 elements and needs 5624"]);
    says(&a(matrix(FAR, 88, 63 * 88 + 80)), plain, &["fine"]);
    says(&a(matrix(FAR, usize::MAX - 7, PLENTY)), plain, &["rows of a"]);
    says(&a(matrix(FAR, (i64::MAX - 7) as usize, PLENTY)), plain, &["no memory is that large"]);
    says(&Gemm { b: matrix(FAR, 88, 71 * 88 + 79), ..gemm }, plain, &["b has memory"]);
    says(&Gemm { live: vector(FAR + 1, 1), ..gemm }, plain, &["live lies at", "multiple of 4"]);
    says(&Gemm { live: vector(FAR, 0), ..gemm }, plain, &["live has memory for 0"]);
}

#[test]
fn epilogues() {
    let gemm = good(Layout::Nt);
    let s = |change: &dyn Fn(&mut Store<'static>)| {
        let mut store = store();
        change(&mut store);
        Epilogue::Store(store)
    };
    says(&gemm, s(&|s| s.out = Matrix::none()), &["out is null"]);
    says(&gemm, s(&|s| s.pre = matrix(FAR + 8, 72, PLENTY)), &["pre lies at"]);
    says(&gemm, s(&|s| s.residual = matrix(FAR, 64, PLENTY)), &["rows of residual"]);
    says(&gemm, s(&|s| s.bias = vector(FAR + 4, 72)), &["bias lies at", "multiple of 16"]);
    says(&gemm, s(&|s| s.bias = vector(FAR, 71)), &["bias has memory for 71 elements and needs 72"]);
    says(&gemm, s(&|s| s.gamma = vector(FAR, 8)), &["gamma has memory"]);
    says(&gemm, s(&|s| s.keep = vector(FAR, 63)), &["keep has memory"]);
    says(&gemm, Epilogue::GeluGrad(GeluGrad { pre: Matrix::none(), ..grad() }), &["pre is null"]);
    says(&gemm, Epilogue::GeluGrad(GeluGrad { bias_grad: vector(FAR, 3), ..grad() }), &["bias_grad has"]);
    says(&gemm, Epilogue::GeluGrad(GeluGrad { accumulate: vector(FAR + 2, 1), ..grad() }), &["accumulate"]);
    says(&gemm, Epilogue::Sum(Sum { out: matrix(FAR, 74, PLENTY), ..sum() }), &["rows of out", "of 4"]);
    says(&gemm, Epilogue::Sum(Sum { out: Matrix::none(), ..sum() }), &["out is null"]);
    says(&gemm, Epilogue::Sum(Sum { squares: vector(FAR, 0), ..sum() }), &["squares has memory for 0"]);
}

#[test]
fn plans_and_workspaces() {
    let gemm = good(Layout::Nt);
    let room = vector(9 * FAR, PLENTY);
    let check = |plan, workspace, expected: &str| {
        let message = outcome(&gemm, Epilogue::Sum(sum()), plan, workspace);
        assert!(message.contains(expected), "`{message}` does not say `{expected}`");
    };
    check(Plan { stages: 2, ..PLAN }, room, "2 stages");
    check(Plan { stages: 7, ..PLAN }, room, "7 stages");
    check(Plan { tile: TILES[0], stages: 5, ..PLAN }, room, "needs 245760 bytes of shared memory");
    check(Plan { group: 0, ..PLAN }, room, "group 0");
    check(Plan { splits: 0, ..PLAN }, room, "0 splits");
    let split = Plan { splits: 3, ..PLAN };
    let bytes = 3 * 64 * 72 * 4;
    check(split, Vector::none(), "the workspace has 0 bytes and must have 55296");
    check(split, vector(9 * FAR, bytes - 1), "must have 55296");
    check(split, vector(9 * FAR + 8, bytes), "the workspace lies at");
    check(split, vector(9 * FAR, bytes), "fine");
    check(PLAN, Vector::none(), "fine");
    let refused = outcome(&gemm, Epilogue::Store(store()), split, room);
    assert!(refused.contains("only a sum in f32 can be split"), "{refused}");
    let partial = outcome(&gemm, Epilogue::GeluGrad(grad()), PLAN, vector(9 * FAR, 72 * 4 - 1));
    assert!(partial.contains("must have 288"), "{partial}");
    let large = Gemm {
        shape: Shape { layout: Layout::Nt, m: 1 << 30, n: 1 << 30, k: 8 },
        a: matrix(FAR, 8, 1 << 40),
        b: matrix(FAR, 8, 1 << 40),
        live: Vector::none(),
        dependent: false,
    };
    let plain = Epilogue::Store(Store::plain(matrix(FAR, 1 << 30, 1 << 61)));
    let tiles = outcome(&large, plain, PLAN, room);
    assert!(tiles.contains("tiles"), "{tiles}");
}

#[test]
fn column_sums() {
    let good = BiasGrad {
        dy: matrix::<bf16>(FAR, 72, PLENTY),
        m: 300,
        n: 72,
        live: Vector::none(),
        out: vector(2 * FAR, 72),
        accumulate: Vector::none(),
    };
    let check = |grad: BiasGrad<'_>, workspace, expected: &str| {
        let message = grad.check(&workspace).map_or_else(|e| e.to_string(), |()| "fine".into());
        assert!(message.contains(expected), "`{message}` does not say `{expected}`");
    };
    let room = vector(3 * FAR, good.workspace_bytes());
    check(good, room, "fine");
    check(BiasGrad { m: 0, ..good }, room, "m is 0");
    check(BiasGrad { n: 71, ..good }, room, "n is 71");
    check(BiasGrad { dy: Matrix::none(), ..good }, room, "dy is null");
    check(BiasGrad { out: Vector::none(), ..good }, room, "out is null");
    check(BiasGrad { out: vector(FAR, 71), ..good }, room, "out has memory");
    check(good, vector(3 * FAR, 575), "must have 576");
}
