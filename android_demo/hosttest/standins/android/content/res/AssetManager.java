package android.content.res;

import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;

/** The files of the folder that the property `assets` names, as those of the assets' folder "bundle". */
public final class AssetManager {
    private final File folder = new File(System.getProperty("assets", ""));

    public String[] list(String path) throws IOException {
        return folder.list();
    }

    public InputStream open(String path) throws IOException {
        return new FileInputStream(new File(folder, path.substring("bundle/".length())));
    }
}
