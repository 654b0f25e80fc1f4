// swift-tools-version:5.9
// NOT COMPILED by this project, which has no Swift compiler: its syntax alone was checked. See README.md.
import PackageDescription

let package = Package(
    name: "GemmaMTP",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "GemmaMTP", targets: ["GemmaMTP"])],
    dependencies: [
        // The runtime that bundles are exported with or a newer one; branches are called swiftpm-VERSION.
        .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1"),
    ],
    targets: [
        .target(
            name: "GemmaMTP",
            dependencies: [
                .product(name: "executorch", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"),
                .product(name: "kernels_quantized", package: "executorch"),
            ],
            // Backends and kernels register themselves when they are loaded; nothing refers to them by name. The app
            // that links this library needs the same flag, as "Other Linker Flags".
            linkerSettings: [.unsafeFlags(["-Wl,-all_load"])]
        ),
        .testTarget(name: "GemmaMTPTests", dependencies: ["GemmaMTP"]),
    ]
)
