package gemmamtp.demo

import android.content.res.AssetManager
import gemmamtp.core.MANIFEST
import java.io.InputStream

private const val ASSETS = "bundle"

/** The bundle in the APK's assets. */
class AssetSource(private val assets: AssetManager, override val name: String) : BundleSource {
    /** Whether the APK has a bundle. */
    val exists: Boolean get() = MANIFEST in assets.list(ASSETS).orEmpty()

    override fun open(name: String): InputStream? =
        if (name in assets.list(ASSETS).orEmpty()) assets.open("$ASSETS/$name") else null

    override fun close() = Unit
}
